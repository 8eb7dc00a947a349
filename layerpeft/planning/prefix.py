"""What keeping the states that enter the lowest trained layer takes and spares: bytes of rows, operations of epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import LayerMapError, LayerpeftError
from layerpeft.integrations.tracing import as_traced, weight_bytes
from layerpeft.model.architectures import text_config
from layerpeft.model.costs import costs_of
from layerpeft.model.layers import base_of
from layerpeft.model.load import Load
from layerpeft.planning.parts import Wrapped, training
from layerpeft.planning.trace import Step, parted, recompute
from layerpeft.selection.scoring import needs
from layerpeft.selection.states import entering_states
from layerpeft.training.prefix.below import Below, in_front, why_off
from layerpeft.training.prefix.cache import CHANGES
from layerpeft.training.prefix.running import Form
from layerpeft.training.prefix.setting import Setting
from layerpeft.training.prefix.upper import StandIn
from layerpeft.training.prefix.upwards import forms_below
from layerpeft.tuners.config import LayerLoraConfig

SCALE = 4  # bytes, of the states of one token in 8 bits
WAITS = "it goes by the layers that will be chosen, and the lowest are assumed here"


@dataclass(frozen=True)
class Entering:
    """What enters a layer in a step: numbers of a token, and bytes of each; and operations of the layers below it."""

    width: int
    itemsize: int
    below: int

    def token(self, bits: int | None) -> int:
        """Bytes that are kept of a token, in so many bits (None: as it enters)."""
        return self.width + SCALE if bits == 8 else self.width * self.itemsize


@dataclass(frozen=True)
class Apart:
    """Peaks in bytes where nothing below the cut is ever loaded: of `training` what lies above, and of `filling` what enters it
    before that, with one layer in memory at a time."""

    training: int
    filling: int

    @property
    def most(self) -> int:
        """What both fit into."""
        return max(self.training, self.filling)


@dataclass(frozen=True)
class Prefix:
    """`layer`: where later epochs begin; `why`: nothing is kept, for this reason; `token`: bytes of one that are kept; `whole` and
    `later`: operations of a step of a first epoch, which are those of a step without, and of a later one; `setting`: as asked, None
    where nobody has, and this is what it would be; `known`: it does not hang on a choice that is not made yet; `apart`: of states
    on disk, where the upper part can train alone."""

    layer: int | None
    why: str | None
    token: int = 0
    whole: int = 0
    later: int = 0
    setting: Setting | None = None
    known: bool = True
    apart: Apart | None = None

    @property
    def lasts(self) -> bool:
        """Whether it was asked for, can be had, and is there for other runs."""
        return self.setting is not None and self.setting.where != "memory" and self.why is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {"setting": self.setting and self.setting.plain(), "apart": self.apart and vars(self.apart)}


@dataclass(frozen=True)
class Rows:
    """How a training goes over its rows. `tokens`: real ones of all rows (`about`: from some of them), `held_out`: those of rows
    that are evaluated, more than once; `batch`: rows that go through the model together."""

    epochs: float
    tokens: int
    held_out: int = 0
    about: bool = False
    batch: int = 1

    def to_dict(self, found: Prefix) -> dict[str, Any]:
        """Plain data, of what states of these rows take and spare."""
        return {
            "epochs": self.epochs,
            "tokens": self.tokens + self.held_out,
            "bytes": self.takes(found),
            "ratio": self.ratio(found),
        }

    def takes(self, found: Prefix) -> int:
        """Bytes of the states of all rows."""
        return found.token * (self.tokens + self.held_out)

    def found(self, found: Prefix) -> float:
        """The share of a later epoch's batches that begin at the cut: those of which every row is kept within the limit."""
        limit = found.setting.limit if found.setting is not None else None
        return 1.0 if limit is None else min(1.0, limit / max(1, self.takes(found))) ** self.batch

    def ratio(self, found: Prefix) -> float:
        """Operations of all epochs, as a share of those without."""
        again, hit = max(0.0, self.epochs - 1), self.found(found)
        mean = hit * found.later + (1 - hit) * found.whole
        return (found.whole * min(1.0, self.epochs) + again * mean) / (found.whole * self.epochs)


def prefix(
    found: Wrapped,
    config: Any,
    flops: int,
    shape: tuple[int, int],
    step: Step,
    inputs: Mapping[str, Any] | None = None,
) -> Prefix | None:
    """Of a step of `flops` operations; None where nobody asked, and it would bring nothing or is not known without a trace."""
    if not isinstance(config, LayerLoraConfig) or found.layers is None:
        return None
    setting, cut = config.caching, found.stop.layer
    names = found.layers.names
    known = config.is_scheduled or cut is not None or needs(config.choosing) == "nothing"
    why = CHANGES if config.is_scheduled else (found.stop.why if known else WAITS) if cut is None else None
    if why is None and cut is not None:
        why = why_off(base_of(found.model), Below(names, cut), config.drops_below)
    if why is not None or cut is None:
        return None if setting is None else Prefix(cut, why, 0, flops, flops, setting, known)
    if setting is None:
        entering = _from_shapes(found, cut, shape) if inputs is None else None
    else:
        entering = _traced(found, cut, shape, step, inputs)
    if entering is None:
        return None
    bits = setting.bits if setting is not None else None
    return Prefix(cut, None, entering.token(bits), flops, flops - entering.below, setting)


def _from_shapes(found: Wrapped, cut: int, shape: tuple[int, int]) -> Entering | None:
    base: Any = base_of(found.model)
    assert found.layers is not None
    try:
        costs = costs_of(base, found.layers, found.layers.targets, Load(*shape))
    except LayerMapError:
        return None
    width = getattr(text_config(base), "hidden_size", None)
    below = sum(c.forward for c in costs.layers[:cut])
    itemsize = next((p.element_size() for p in base.parameters() if p.is_floating_point()), None)
    return None if width is None or itemsize is None else Entering(width, itemsize, below)


def _traced(
    found: Wrapped, cut: int, shape: tuple[int, int], step: Step, inputs: Mapping[str, Any] | None
) -> Entering | None:
    """From one more pass, with marks at the layers."""
    assert found.layers is not None
    blocks = [base_of(found.model).get_submodule(name) for name in found.layers.names[: cut + 1]]
    seen: list[torch.Tensor | None] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(entering_states(args, kwargs))

    handle = blocks[-1].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with as_traced(found.model):
            live, _ = parted(found.model, *shape, step, inputs, blocks)
    finally:
        handle.remove()
    states = next((s for s in seen if s is not None), None)
    below = sum(p.flops for p in live.parts if p.place[0] == "forward" and p.place[1] < cut)
    return None if states is None else Entering(states.shape[-1], states.element_size(), below)


def apart(
    found: Wrapped,
    plain: nn.Module,
    cut: int,
    optimizer: str,
    step: Step,
    shape: tuple[int, int],
    checkpointing: bool,
    inputs: Mapping[str, Any] | None = None,
) -> Apart | None:
    """The peaks of filling ahead and of training the upper part alone; None where a model cannot do without its lower part.

    `plain`: the model without the adapter and without storage.
    """
    assert found.layers is not None
    base, names = base_of(found.model), found.layers.names
    if found.teacher is not None:
        return None
    try:
        forms = forms_below(plain, names, cut)
    except LayerpeftError:
        return None
    _checkpointing(found.model, step, checkpointing)
    with _standing(base, names[:cut], forms), as_traced(found.model):
        live, gradients = parted(found.model, *shape, step, inputs)
        cost = training(found, optimizer, step.optim_args)
        trains = found.weights + cost.masters + cost.gradients + cost.states + max(0, live.peak - gradients)
    return Apart(trains, _filling(found, cut, step, shape, inputs, forms))


def _filling(
    found: Wrapped,
    cut: int,
    step: Step,
    shape: tuple[int, int],
    inputs: Mapping[str, Any] | None,
    forms: Sequence[Form],
) -> int:
    """What lies in front of the layers, the largest of those below the cut, and what it makes of a batch."""
    assert found.layers is not None
    base, names = base_of(found.model), found.layers.names[:cut]
    sizes = [weight_bytes(base.get_submodule(name)) for name in names]
    largest = sizes.index(max(sizes))
    front = {id(p): p.nbytes for _, m in in_front(base, names[0]) for p in m.parameters(recurse=False)}
    others = [i for i in range(cut) if i != largest]
    with _standing(base, [names[i] for i in others], [forms[i] for i in others]), as_traced(found.model):
        live, _ = parted(found.model, *shape, step, inputs, [base.get_submodule(names[largest])], backward=False)
    made = max((part.peak for part in live.parts if part.place[0] == "forward"), default=0)
    return sum(front.values()) + sizes[largest] + made


def _checkpointing(model: nn.Module, step: Step, on: bool) -> None:
    """As it is to be, whatever was traced before."""
    if on:
        recompute(model, step)
    elif hasattr(base := base_of(model), "activation_checkpointing_disable"):
        with suppress(ValueError):
            base.activation_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def _standing(base: nn.Module, names: Sequence[str], forms: Sequence[Form]) -> Iterator[None]:
    """Inside, blocks of these names are stand-ins without weights."""
    blocks = [base.get_submodule(name) for name in names]
    for name, block, form in zip(names, blocks, forms, strict=True):
        base.set_submodule(name, StandIn(block, form))
    try:
        yield
    finally:
        for name, block in zip(names, blocks, strict=True):
            base.set_submodule(name, block)
