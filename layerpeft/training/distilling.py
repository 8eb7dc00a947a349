"""A teacher beside training: it runs on what the student is about to see, and what it says is learned with the student's own loss.

Two hooks on the model do it, so that trainers and loops need not know. Before a forward pass of training the teacher runs without
gradients; after it, what the student's layers gave out is compared, and the terms go into the backward pass of the loss that the
trainer makes of the output. The loss that is reported stays that of the task.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, TrainingError, told
from layerpeft.integrations.checkpointing import is_replica
from layerpeft.integrations.losses import IGNORED, learned_beside
from layerpeft.integrations.peft import without_adapters
from layerpeft.integrations.torch import eager
from layerpeft.model.architectures import text_config
from layerpeft.model.evaluating import as_found
from layerpeft.model.home import known_of
from layerpeft.model.layers import LayerMap, find_module, layer_map
from layerpeft.model.outputs import counted_tokens, logits_of
from layerpeft.selection.states import given, states_in
from layerpeft.training.distill import BASE, Distill, distance, divergence

NO_LOSS = (
    "distill adds to the loss that the model's output gives, and this trainer takes another (label smoothing, a loss function of "
    "its own, preferences, rewards); train with SFTTrainer's nll or with Trainer's own loss"
)
UNREACHED = (
    "distill: no gradient comes to what the chosen layers give out, so that nothing would be learned from the teacher: they lie "
    "below the lowest layer that trains"
)
OTHER_HEAD = (
    "distill: kl compares what the head makes of the last states, and this model changes that besides, or has no such head; take "
    "kl out, and learn from hidden states alone"
)


@dataclass
class _Seen:
    """What the layers of one forward pass gave out, and what entered the head; hooks are on until `close`."""

    states: dict[int, torch.Tensor]
    last: list[torch.Tensor]
    handles: list[Any]

    def close(self) -> None:
        while self.handles:
            self.handles.pop().remove()


def _watch(model: nn.Module, layers: LayerMap, numbers: Iterable[int], last: bool) -> _Seen:
    seen = _Seen({}, [], [])

    def leave(number: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if (found := states_in(output)) is not None:
                seen.states[number] = found

        return eager(hook)

    for number in dict.fromkeys(numbers):
        block = find_module(model, layers.layers[number].name)
        seen.handles.append(block.register_forward_hook(leave(number)))
    inner = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if last and isinstance(inner, nn.Module):

        def end(_module: nn.Module, _args: Any, output: Any) -> None:
            if (found := states_in(output)) is not None:
                seen.last[:] = [found]

        seen.handles.append(inner.register_forward_hook(eager(end)))
    return seen


class Distilling:
    """State is real here: what the teacher has said of the batch that is running, and what to tell trackers.

    `teacher`: a model of its own, or None for the student without its adapter; `pairs` as in `Distill.pairs`; `switches`: other
    layers train at other steps, so that some steps may have nothing to learn.
    """

    def __init__(self, asked: Distill, model: nn.Module, layers: LayerMap, switches: bool = False) -> None:
        self.asked, self.layers, self.switches = asked, layers, switches
        self.teacher = teacher_of(asked, model)
        self.others, self.pairs = paired(asked, model, layers, self.teacher)
        self._busy, self._checked = False, False
        self._said: tuple[_Seen, torch.Tensor | None, Mapping[str, Any]] | None = None
        self._mine: _Seen | None = None
        self._sums: dict[str, tuple[Any, int]] = {}

    def install(self, model: nn.Module) -> None:
        """From now on, for this model and its copies."""
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after)

    def twin(self) -> Distilling:
        """That of a copy of the model, by the same teacher."""
        twin = copy.copy(self)
        twin._mine, twin._said, twin._sums = None, None, {}
        return twin

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The teacher runs. Raises: TrainingError where it cannot."""
        if self._mine is not None:  # the pass before did not end
            self._mine.close()
        self._mine = None
        if self._busy or not (model.training and torch.is_grad_enabled()):
            return
        if is_replica(model):
            raise TrainingError(
                "distill: DataParallel copies the model at every step; use one device a process (torchrun)"
            )
        inputs, self._busy = dict(given(model, args, kwargs)), True
        try:
            self._said = (*self._taught(model, inputs), inputs)
        finally:
            self._busy = False
        self._mine = _watch(
            model, self.layers, [s for s, _ in self.pairs] if self.asked.weight else (), bool(self.asked.kl)
        )

    def after(self, model: nn.Module, output: Any) -> Any:
        """The output, from whose loss what the teacher says is learned, too; None where nothing was asked."""
        mine, said, self._mine, self._said = self._mine, self._said, None, None
        if self._busy or mine is None or said is None:
            return None
        mine.close()
        theirs, answers, inputs = said
        terms: dict[str, torch.Tensor] = {}
        if self.asked.weight:
            parts = [self._apart(model, inputs, mine, theirs, s, t) for s, t in self.pairs]
            terms["hidden"] = torch.stack([p.to(parts[0].device) for p in parts]).mean()
        if answers is not None:
            head: Any = model.get_output_embeddings()  # type: ignore[operator]
            counted = counted_tokens(model, inputs, mine.last[0])
            terms["kl"] = divergence(mine.last[0][counted], head, answers, self.asked.temperature)
        if not self.switches and not any(term.requires_grad for term in terms.values()):
            raise TrainingError(UNREACHED)
        for name, term in terms.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + term.detach(), count + 1
        weights = {"hidden": self.asked.weight, "kl": self.asked.kl}
        more = sum(
            (weights[n] * term.to(next(iter(terms.values())).device) for n, term in terms.items()), torch.tensor(0.0)
        )
        found = learned_beside(model, inputs, output, more, self.asked.task)
        if found is None:
            raise TrainingError(NO_LOSS)
        return found

    def news(self) -> dict[str, float]:
        """The means of its terms since this was asked last."""
        found = {f"distill/{name}": float(total) / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return found

    def _taught(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[_Seen, torch.Tensor | None]:
        """What leaves the teacher's layers, and its answers at the tokens that count."""
        teacher: Any = model if self.teacher is None else self.teacher
        own, kl = self.teacher is None, bool(self.asked.kl)
        if not own:
            self._move(model)
        numbers = [t for _, t in self.pairs] if self.asked.weight else ()
        with (
            as_found(model) if own else nullcontext(),
            torch.no_grad(),
            without_adapters(model) if own else nullcontext(),
        ):
            seen = _watch(teacher, self.others, numbers, kl)
            try:
                # not through its hooks: those that count the student's passes are not to count this one
                output = teacher.forward(**_for_teacher(teacher, inputs))
            finally:
                seen.close()
            if not kl:
                return seen, None
            head = getattr(teacher, "get_output_embeddings", lambda: None)()
            if head is None or not seen.last:
                raise TrainingError(OTHER_HEAD)
            if not self._checked:
                logits = logits_of(output, "distill")
                made = head(seen.last[0][:, -logits.shape[1] :])
                if made.shape != logits.shape or not torch.allclose(made.float(), logits.float(), rtol=1e-2, atol=1e-3):
                    raise TrainingError(OTHER_HEAD)
                self._checked = True
            return seen, head(seen.last[0][counted_tokens(model, inputs, seen.last[0])])

    def _move(self, model: nn.Module) -> None:
        assert self.teacher is not None
        here = next(model.parameters()).device
        if next(self.teacher.parameters()).device != here:
            self.teacher.to(here)

    def _apart(
        self, model: nn.Module, inputs: Mapping[str, Any], mine: _Seen, theirs: _Seen, student: int, teacher: int
    ) -> torch.Tensor:
        a, b = mine.states.get(student), theirs.states.get(teacher)
        if a is None or b is None or a.shape != b.shape:
            shapes = " and ".join("nothing" if x is None else str(tuple(x.shape)) for x in (a, b))
            raise TrainingError(
                f"distill: layer {student} and the teacher's layer {teacher} give out {shapes}; states of one shape can be compared"
            )
        return distance(self.asked.loss, a, b.to(a.device), _real(model, self.layers, inputs, a))


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for found in _of(model):
        found.before(model, args, kwargs)


def _after(model: nn.Module, _args: Any, output: Any) -> Any:
    for found in _of(model):
        output = changed if (changed := found.after(model, output)) is not None else output
    return output


_before, _after = eager(_before), eager(_after)


def _of(model: nn.Module) -> list[Distilling]:
    """Those of the model's adapters that are there; a pickled copy of the model has none."""
    tether = known_of(model).tether
    found = [f.record.distilling for f in tether.followers if f.live] if tether is not None else []
    return [d for d in found if d is not None]


def _for_teacher(teacher: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher is called with: no loss, and no more answers than need be."""
    decodes = bool(getattr(teacher.config, "is_encoder_decoder", False))
    left = ("num_items_in_batch", "fused_lm_head", "shift_labels", "use_cache", *(() if decodes else ("labels",)))
    found = {k: v for k, v in inputs.items() if k not in left}
    takes = inspect.signature(type(teacher).forward).parameters
    return found | {k: v for k, v in (("logits_to_keep", 1), ("use_cache", False)) if k in takes}


def _real(model: nn.Module, layers: LayerMap, inputs: Mapping[str, Any], states: torch.Tensor) -> torch.Tensor | None:
    """(rows, tokens), True for what is no padding; None where there is none that is told."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in layers.stack
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is None and decodes and isinstance(labels := inputs.get("labels"), torch.Tensor):
        mask = labels != IGNORED
    fits = isinstance(mask, torch.Tensor) and states.dim() > 2 and mask.shape == states.shape[:2]
    return (mask != 0).to(states.device) if fits else None


def teacher_of(asked: Distill, model: nn.Module) -> nn.Module | None:
    """The model that teaches, frozen; of a model without storage one without storage. Raises: ConfigError for one that cannot be
    had."""
    if asked.teacher == BASE:
        return None
    kind: Any = type(model)
    first = next(model.parameters())
    try:
        if first.is_meta:
            with torch.device("meta"):
                teacher = kind(kind.config_class.from_pretrained(asked.teacher)).to(first.dtype)
        else:
            teacher = kind.from_pretrained(asked.teacher, dtype=first.dtype if first.is_floating_point() else None)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"distill: teacher: {asked.teacher!r} cannot be had as {kind.__name__} ({told(error, 200)})"
        ) from error
    return teacher.eval().requires_grad_(False)


def paired(
    asked: Distill, model: nn.Module, layers: LayerMap, teacher: nn.Module | None
) -> tuple[LayerMap, tuple[tuple[int, int], ...]]:
    """The teacher's layers, and which teaches which. Raises: ConfigError for another width, and as `Distill.pairs`."""
    if teacher is None:
        return layers, asked.pairs(len(layers), len(layers))
    widths = [getattr(text_config(m), "hidden_size", None) for m in (model, teacher)]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"distill: the model's states are {widths[0]} wide and its teacher's {widths[1]}; they are compared as they are"
        )
    others = layer_map(teacher, layers.stack)
    return others, asked.pairs(len(layers), len(others))
