"""One pass of a model: which rows it sees, whether it may begin at the cut, and what is put back afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from layerpeft.model.architectures import text_config
from layerpeft.training.prefix import below
from layerpeft.training.prefix.below import Below
from layerpeft.training.prefix.rows import IMAGES, Row, assembled, length, rows_of
from layerpeft.training.prefix.running import RANDOM, Form, Running, drew, random_states
from layerpeft.training.prefix.source import MissingRow, Source
from layerpeft.training.prefix.store import Store

SEEN = ("output_hidden_states", "output_attentions", "output_router_logits")
# What a proof is for: whether the model trains, what autocast casts to; and whether rows hold several texts, batches several rows,
# padding, pictures.
Mode = tuple[Any, ...]


@dataclass(frozen=True)
class Keyed:
    """What keys of rows hang on besides the rows, of one model: as `rows_of`; `cast`: the type that autocast casts to."""

    decoder: bool
    image: int | None
    flash: bool
    cast: torch.dtype | None

    @classmethod
    def of(cls, model: nn.Module, found: Below, kind: str) -> Keyed:
        """As it is now, on a device of that kind."""
        config: Any = getattr(model, "config", None)
        return cls(
            bool(getattr(config, "is_encoder_decoder", False)) and "decoder" in found.names[0],
            getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None),
            "flash" in str(getattr(config, "_attn_implementation", "")),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )

    def rows(
        self, inputs: Mapping[str, Any], hidden: torch.Tensor, kwargs: Mapping[str, Any]
    ) -> tuple[list[Row], Mode]:
        """The rows of a call of the model, where `hidden` and `kwargs` enter its first block: none where they cannot be told apart;
        and what about them a proof is for."""
        shape = (hidden.shape[0], hidden.shape[1])
        several = stops(inputs.get("position_ids"), kwargs, self.flash) or is_one(inputs)
        found = self.alike(inputs, shape, hidden.dtype, several)
        padded = sum(map(length, found)) < shape[0] * shape[1]
        pictures = self.image is not None and any(name.startswith(IMAGES) for name in inputs)
        return found, (several, len(found) > 1, padded, pictures)

    def alike(self, inputs: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype, several: bool) -> list[Row]:
        """The rows of a batch, of which those things are known: none where they cannot be told apart."""
        salt = f"{self.cast}{dtype}".encode()
        return rows_of(inputs, shape, several=several, decoder=self.decoder, image=self.image, salt=salt) or []


class Pass:
    """One forward pass: what it is called with, its rows, and how its blocks run."""

    def __init__(
        self,
        model: nn.Module,
        found: Below,
        inputs: dict[str, Any],
        store: Store,
        proved: Collection[Mode],
        forms: dict[int, Form],
        lower_dropout: bool,
        source: Source | None = None,
    ) -> None:
        self.source = source
        self.below, self.inputs, self.store, self.forms, self.lower_dropout = found, inputs, store, forms, lower_dropout
        self.rows: list[Row] = []
        self.kind: tuple[Any, ...] | None = None  # how keys of its rows were made
        self.kept = False
        weights = (p for name in (found.names[0], found.block) for p in model.get_submodule(name).parameters())
        self.device = next((p.device for p in weights), torch.device("cpu"))
        self.keyed = Keyed.of(model, found, self.device.type)
        self.mode: Mode = (model.training, self.keyed.cast)
        self.proved = proved
        self.divided = isinstance(model.get_submodule(found.block), FSDPModule)
        self.quiet = self.quieted(model)
        self.random = random_states(self.device)
        self.running = Running(found.blocks(model), forms, self.decide, self.device)

    def close(self) -> None:
        """All is as before."""
        self.running.close()
        wake(self.quiet)

    def quieted(self, model: nn.Module) -> list[nn.Module]:
        """Puts what is random below the cut in evaluation mode, where that is asked for; those modules."""
        return quieted(model, self.below) if model.training and not self.lower_dropout else []

    @torch.no_grad()
    def decide(self, hidden: torch.Tensor | None, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """What enters the cut, where it is kept of every row; None: all is computed."""
        if hidden is None or hidden.dim() < 3:
            return None
        if drew(self.random, random_states(self.device)):
            self.running.why = RANDOM.format(self.below.cut)
            return None
        shape = (hidden.shape[0], hidden.shape[1])
        self.rows, kind = self.keyed.rows(self.inputs, hidden, kwargs)
        self.kind = (self.keyed, hidden.dtype, kind[0], frozenset(self.inputs))
        if not self.divided:  # or a process would prove alone what another has proved, and wait for its weights
            self.mode = (*self.mode[:2], *kind)
        if not self.rows or (self.mode not in self.proved and self.source is None):
            return None
        states = self.store.get([row.key for row in self.rows])
        if states is None:
            if self.source is not None:
                raise self._missing(self.source)
            return None
        self.kept = True
        return assembled(self.rows, states, shape, hidden.device)

    def _missing(self, source: Source) -> MissingRow:
        """A row of which nothing is kept, by its tokens."""
        row = next((row for row in self.rows if not self.store.has(row.key)), self.rows[0])
        ids = self.inputs.get("input_ids")
        there = isinstance(ids, torch.Tensor) and ids.dim() == 2 and not self.keyed.decoder
        return source.missing(length(row), ids[row.row, row.places].tolist() if there else ())  # type: ignore[index]


def stops(positions: Any, kwargs: Mapping[str, Any], flash: bool) -> bool:
    """Whether texts in one row, told apart by positions that begin anew, do not see each other in what a block is called with."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return False
    cuts = [(int(row), int(at) + 1) for row, at in (positions.diff(dim=1) != 1).nonzero()]
    mask = kwargs.get("attention_mask")
    if not cuts or flash:
        return bool(cuts) and mask is None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return False
    closed = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    return all(bool(closed[min(row, len(closed) - 1), :, at:, :at].all()) for row, at in cuts)


def is_one(inputs: Mapping[str, Any]) -> bool:
    """Whether each row is one text by its positions, and by all else that says where texts end: it has the key that it has among
    others in a row."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or bool((positions.diff(dim=1) != 1).any()):
        return False
    ends = [v for k, v in inputs.items() if k.startswith("cu_seq_lens") and isinstance(v, torch.Tensor)]
    marks = inputs.get("seq_idx")
    return all(end.numel() == 2 for end in ends) and (marks is None or bool((marks == marks[..., :1]).all()))


def unfit(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Why a pass is not one that can begin at the cut."""
    if inputs.get("past_key_values") is not None:
        return "a pass that goes on from keys and values (generation) needs those of every layer"
    if keeps(model, inputs):
        return "with use_cache a model hands out keys and values of every layer"
    config: Any = text_config(model)
    for name in SEEN:
        asked = inputs.get(name)
        if asked if asked is not None else getattr(config, name, False):
            return f"{name} asks for those of every layer"
    return None


def keeps(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model hands out keys and values."""
    asked = inputs.get("use_cache")
    if asked is not None or "use_cache" not in inspect.signature(model.forward).parameters:
        return bool(asked)
    return bool(getattr(text_config(model), "use_cache", False))


def wake(quiet: list[nn.Module]) -> None:
    for module in quiet:
        module.training = True


def quieted(model: nn.Module, found: Below) -> list[nn.Module]:
    """What was put in evaluation mode below the cut: of what holds the blocks, whose flag says more than that, only what is random
    by itself."""
    around = {
        id(m) for name, m in below.in_front(model, found.names[0]) if found.names[0].startswith(f"{name}." * bool(name))
    }
    modules = [(name, m) for name, m in below.modules_below(model, found) if m.training]
    quiet = [m for name, m in modules if id(m) not in around or below.random_in([(name, m)])]
    for module in quiet:
        module.training = False
    return quiet
