"""What a recipe's trainer calls its model with, batch after batch, without the model: for states that are computed elsewhere.

The trainer is built as training builds it, around a shell: all modules of the model, and no number in any of them. Where it calls
the model it finds out nothing, and what it called with is kept. Language-model losses of TRL go on from answers without meaning,
so that calls that come later in a step are seen as well; other trainers are stopped at the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers.modeling_outputs import BaseModelOutput

from layerpeft.errors import RecipeError
from layerpeft.model.evaluating import standing_in
from layerpeft.model.layers import base_of, layer_map
from layerpeft.recipe.model import empty_model
from layerpeft.recipe.trainer import Setup, make_trainer
from layerpeft.selection.states import given
from layerpeft.training.prefix.passing import keeps, unfit
from layerpeft.training.prefix.streaming import Call


@dataclass(frozen=True)
class Calls:
    """A recipe's trainer around a shell. `steps`: batches of an epoch and of the held-out rows; iterating gives the calls, those
    over held-out rows first, as a run measures them before it trains."""

    trainer: Any
    model: nn.Module  # the shell, which a trainer may hold within others
    vectors: bool = False  # of hidden states, for each text of a row

    @property
    def steps(self) -> int:
        return sum(len(loader) for _, loader in self._loaders())

    @property
    def cast(self) -> torch.dtype | None:
        """The type that autocast casts to in training."""
        kind = self.trainer.accelerator.device.type
        with self.trainer.accelerator.autocast():
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @property
    def tokens(self) -> int | None:
        """Tokens of all rows, as they are in the data sets; None where those do not say."""
        parts = [p for p in (self.trainer.train_dataset, self.trainer.eval_dataset) if p is not None]
        if not all("input_ids" in (getattr(part, "column_names", None) or ()) for part in parts):
            return None
        return sum(len(ids) for part in parts for ids in part["input_ids"])

    def __iter__(self) -> Iterator[Call]:
        for training, loader in self._loaders():
            for batch in loader:
                yield from self._of(batch, training)

    def _loaders(self) -> list[tuple[bool, Any]]:
        found = [(True, self.trainer.get_train_dataloader())]
        return [(False, self.trainer.get_eval_dataloader())] * (self.trainer.eval_dataset is not None) + found

    def _of(self, batch: Any, training: bool) -> list[Call]:
        base, seen = base_of(self.model), []
        self.trainer.model.train(training)

        @wraps(base.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.append(_call(base, args, kwargs, training))
            if kwargs.get("fused_lm_head"):
                return _nothing(kwargs["labels"][:, 1:])
            if self.vectors:
                return _nowhere(kwargs["input_ids"], base)
            raise _Enough

        try:
            with standing_in(base, forward), torch.no_grad():
                self.trainer.compute_loss(self.trainer.model, self.trainer._prepare_inputs(batch))
        except Exception:  # whatever a loss makes of such answers
            if not seen:
                raise
        return seen


class _Enough(Exception):
    pass


def calls_of(setup: Setup) -> Calls:
    """Those of the recipe's trainer. Raises: RecipeError where rows are streamed."""
    if setup.recipe.row.writes:
        raise RecipeError(
            "trainer: its answers are written in training, so that what enters a layer cannot be filled ahead"
        )
    shell: Any = _shell(setup)
    changes = {"report_to": "none", "push_to_hub": False, "dataloader_drop_last": False}
    trainer = make_trainer(setup, shell, **changes)
    if isinstance(trainer.train_dataset, IterableDataset):
        raise RecipeError("dataset_name: rows that are streamed never come again, so that none can be filled ahead")
    return Calls(trainer, shell, setup.recipe.row.vectors)


def _shell(setup: Setup) -> nn.Module:
    """The recipe's model with an adapter, so that a trainer needs no other reference, of which no tensor holds a number."""
    model = empty_model(setup.recipe, *setup.head)
    name = layer_map(model).targets[-1].name
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shell: Any = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=[name]))  # type: ignore[arg-type]
    for module in shell.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                nothing = torch.empty(0, dtype=parameter.dtype)
                module._parameters[key] = nn.Parameter(nothing, parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(0, dtype=buffer.dtype)
    return shell


def _call(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Call:
    """As the model is called where states are kept. Raises: RecipeError where such a call is computed whole."""
    inputs = dict(given(base, args, kwargs))
    if keeps(base, inputs) and inputs.get("past_key_values") is None:
        inputs["use_cache"] = False
    if (why := unfit(base, inputs)) is not None:
        raise RecipeError(f"{why}, so that nothing can be filled ahead")
    return Call(inputs, training)


def _nothing(labels: torch.Tensor) -> Any:
    """An answer of TRL's language-model head that says nothing, for labels (rows, tokens)."""
    zeros, no = torch.zeros(labels.shape, device=labels.device), torch.zeros_like(labels, dtype=torch.bool)
    numbers = dict.fromkeys(("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"), zeros)
    return SimpleNamespace(loss=zeros.sum(), aux_loss=zeros.sum(), is_top1=no, label_mask=~no, **numbers)


def _nowhere(ids: torch.Tensor, base: Any) -> Any:
    """Hidden states that say nothing, for token ids (rows, tokens)."""
    return BaseModelOutput(torch.zeros(*ids.shape, base.config.get_text_config().hidden_size, device=ids.device))  # type: ignore[arg-type]
