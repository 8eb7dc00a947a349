"""What one card of several holds, and what passes between them in a step: counted under an engine, from a trace without storage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.tracing import as_traced, is_stand_in, weight_bytes
from layerpeft.planning import optimizer_bytes
from layerpeft.planning.engines import Cards
from layerpeft.planning.parts import Wrapped
from layerpeft.planning.trace import Step, recompute, trace
from layerpeft.planning.units import (
    Gathers,
    Unit,
    Visit,
    block_gathers,
    by_block,
    by_module,
    module_gathers,
    part_of,
    watching,
)


@dataclass(frozen=True)
class Moved:
    """How often something passes between cards in a step, and the bytes of the whole of it."""

    times: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """What passes between the cards for one optimizer step. `forward`, `backward`: weights gathered; `reduced`: gradients;
    `updated`: weights gathered after the step; `received`: bytes that one card receives, rings assumed."""

    forward: Moved
    backward: Moved
    reduced: Moved
    updated: int
    received: int


@dataclass(frozen=True)
class Kept:
    """Frozen units that stay whole between forward and backward pass: bytes more on a card, and fewer gathered in a step."""

    units: int
    held: int
    saved: int


@dataclass(frozen=True)
class Share:
    """One card's bytes under an engine, and the traffic of a step. `weights`: its part of all weights, buffers whole; `masters`:
    float32 copies of what trains; `gathered`: weights that are whole at one time; `buffers`: what collectives use besides."""

    engine: str
    processes: int
    weights: int
    masters: int
    gradients: int
    states: int
    activations: int
    gathered: int
    buffers: int
    traffic: Traffic
    kept: Kept | None
    assumed: tuple[str, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        names = ("weights", "masters", "gradients", "states", "activations", "gathered", "buffers")
        return {name: getattr(self, name) for name in names}

    @property
    def together(self) -> int:
        """All parts, each at its own peak."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"together": self.together}


@dataclass(frozen=True)
class _Tensor:
    """A parameter as an engine stores it: bytes of an element there, and whether it trains, or has states that are kept."""

    shape: torch.Size
    size: int
    trains: bool
    stateful: bool


def share(
    found: Wrapped, optimizer: str, step: Step, shape: tuple[int, int], checkpointing: bool, inputs: Any = None
) -> Share:
    """One card's share of a step under `step.cards`, `shape` being rows and tokens of one card. Traces one pass of a copy."""
    assert step.cards is not None
    return shares(found, optimizer, step, shape, checkpointing, inputs, (step.cards.processes,))[0]


def shares(
    found: Wrapped,
    optimizer: str,
    step: Step,
    shape: tuple[int, int],
    checkpointing: bool,
    inputs: Any,
    processes: Sequence[int],
) -> list[Share]:
    """A share for each of these numbers of cards, from one trace."""
    assert step.cards is not None
    engine, mixed = step.cards.engine, step.autocast is not None and step.autocast.itemsize < 4
    model = _computing(found.model, step.cards, mixed, step)
    if checkpointing:
        _checkpointed(model, step.cards, step)
    run = step if engine.low == "autocast" else replace(step, autocast=None)
    made = []
    with as_traced(model):
        units = _UNITS[engine.gathers](model, step.cards, step.fused_head)
        with watching(units) as visits:
            activations = trace(model, *shape, run, inputs).peak + found.taught(*shape)[0]
        for n in processes:
            cards = Cards(engine, n)
            units = _UNITS[engine.gathers](model, cards, step.fused_head)
            made.append(_counted(found, cards, optimizer, replace(step, cards=cards), units, visits, activations))
    return made


def _counted(
    found: Wrapped,
    cards: Cards,
    optimizer: str,
    step: Step,
    units: list[Unit],
    visits: list[Visit],
    activations: int,
) -> Share:
    engine, mixed = cards.engine, step.autocast is not None and step.autocast.itemsize < 4
    tensors = list(_stored(found, cards, mixed))
    blocks = engine.gathers == "blocks"
    spared = found.stop.layer is not None  # nothing is fetched ahead below the cut
    gathers = block_gathers(units, visits, spared) if blocks else module_gathers(units, visits, engine.reuse)
    trained = [t for t in tensors if t.trains]
    small = step.autocast.itemsize if mixed and step.autocast is not None else 0
    copies = 4 * sum(_local(t, cards, "states") for t in trained)
    largest = max((u.bytes for u in units if not u.stays), default=0)
    heaviest = max((u.trained * (small or 4) for u in units), default=0)
    return Share(
        engine.title,
        cards.processes,
        _weights(found, tensors, cards) + (found.teacher.weights if found.teacher is not None else 0),
        copies if engine.low == "stored" else _own(found, trained, cards),
        _gradients(trained, cards, small, step.accumulation),
        optimizer_bytes.state_bytes(optimizer, _state_tensors(tensors, cards), step.optim_args),
        activations,
        gathers.peak,
        _buffers(trained, cards, small, largest, heaviest),
        _traffic(units, gathers, trained, cards, small, step.accumulation),
        _kept(units, visits, cards, step.accumulation),
        _assumed(cards, mixed, step),
    )


_UNITS: Mapping[str | None, Callable[..., list[Unit]]] = {"blocks": by_block, "modules": by_module, None: lambda *_: []}


def _checkpointed(model: Any, cards: Cards, step: Step) -> None:
    """As TRL sets it up for an adapter: inputs that require gradients, and the reentrant kind under ZeRO-3."""
    reentrant = {"use_reentrant": True} if step.fused_head and cards.engine.gathers == "modules" else {}
    recompute(model, replace(step, checkpointing_kwargs={**step.checkpointing_kwargs, **reentrant}))
    if step.fused_head and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()


def _computing(model: nn.Module, cards: Cards, mixed: bool, step: Step) -> nn.Module:
    """A copy with weights in the type that they are computed in."""
    packed = {
        id(m.weight): m.weight for m in model.modules() if is_stand_in(m)
    }  # which cannot be copied without storage
    model = copy.deepcopy(model, packed)
    if mixed and cards.engine.low != "autocast":
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and not is_stand_in(module):
                    parameter.data = parameter.data.to(step.autocast)
    return model


def _stored(found: Wrapped, cards: Cards, mixed: bool) -> Iterable[_Tensor]:
    """Every parameter but packed ones, once."""
    packed = {id(m.weight) for m in found.model.modules() if is_stand_in(m)}
    for name, p in found.model.named_parameters():
        if id(p) in packed:
            continue
        size = p.element_size()
        if mixed and p.is_floating_point():
            size = {"autocast": size, "gathered": 4 if p.requires_grad else size, "stored": 2}[cards.engine.low]
        stateful = p.requires_grad or found.keeps_states and name in found.resting
        yield _Tensor(p.shape, size, p.requires_grad, stateful)


def _local(tensor: _Tensor, cards: Cards, what: str) -> int:
    """Elements of it that a card holds."""
    if what not in cards.engine.divides:
        return prod(tensor.shape)
    return prod(part_of(tensor.shape, cards.processes, cards.engine.gathers))


def _weights(found: Wrapped, tensors: Iterable[_Tensor], cards: Cards) -> int:
    whole = {id(p): p.numel() * p.element_size() for p in found.model.parameters()}
    packed = {id(m.weight) for m in found.model.modules() if is_stand_in(m)}
    others = weight_bytes(found.model) - sum(size for key, size in whole.items() if key not in packed)
    kept = sum(_part_bytes(w, cards) for w in found.method.beside())
    return others + kept + sum(_local(t, cards, "weights") * t.size for t in tensors)


def _part_bytes(weight: torch.Tensor, cards: Cards) -> int:
    size = weight.element_size()
    return _local(_Tensor(weight.shape, size, False, False), cards, "weights") * size


def _own(found: Wrapped, trained: Iterable[_Tensor], cards: Cards) -> int:
    """Float32 copies that this package keeps of what trains in 16 bit."""
    return sum(4 * _local(t, cards, "states") for t in trained if t.size < 4) if found.method.masters is not None else 0


def _gradients(trained: Iterable[_Tensor], cards: Cards, small: int, accumulation: int) -> int:
    engine, found = cards.engine, 0
    for t in trained:
        part = _local(t, cards, "gradients")
        found += part * t.size
        if engine.low == "stored":  # around a step there are those of the float32 copies as well
            found += 4 * _local(t, cards, "states") if t.size < 4 else 0
        if engine.gathers == "blocks" and accumulation > 1:  # sums of passes that are not reduced yet are whole
            found += prod(t.shape) * (small or t.size)
    return found


def _state_tensors(tensors: Iterable[_Tensor], cards: Cards) -> list[torch.Tensor]:
    """What the optimizer steps on: parts of tensors, or DeepSpeed's flat part of them all."""
    held = [t for t in tensors if t.stateful]
    with torch.device("meta"):
        if cards.engine.low == "stored":
            return [torch.empty(sum(_local(t, cards, "states") for t in held))] if held else []
        kinds = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
        cut = "states" in cards.engine.divides
        shapes = [part_of(t.shape, cards.processes, cards.engine.gathers) if cut else t.shape for t in held]
        return [torch.empty(s, dtype=kinds[t.size]) for s, t in zip(shapes, held, strict=True)]


def _buffers(trained: Iterable[_Tensor], cards: Cards, small: int, largest: int, heaviest: int) -> int:
    """What collectives need besides what they make."""
    engine = cards.engine
    if (
        engine.gathers == "blocks"
    ):  # the next block as it comes in, and gradients of one as they were made and as they are sent
        return (largest if cards.processes > 1 else 0) + 2 * heaviest
    size = small or max((t.size for t in trained), default=0)
    count = sum(prod(t.shape) for t in trained) if engine.bucket is None else engine.bucket
    return engine.buckets * count * size + engine.early * (small or 4)


def _traffic(
    units: list[Unit], gathers: Gathers, trained: list[_Tensor], cards: Cards, small: int, accumulation: int
) -> Traffic:
    engine, n = cards.engine, cards.processes
    forward = Moved(accumulation * len(gathers.forward), accumulation * sum(units[i].bytes for i in gathers.forward))
    backward = Moved(accumulation * len(gathers.backward), accumulation * sum(units[i].bytes for i in gathers.backward))
    elements = sum(u.trained for u in units) if engine.gathers else sum(prod(t.shape) for t in trained)
    size = small if small and engine.low != "autocast" else max((t.size for t in trained), default=0)
    passes = accumulation if engine.every_pass else 1
    times = (
        sum(u.trained > 0 for u in units)
        if engine.gathers == "blocks"
        else -(-elements // (engine.bucket or elements or 1))
    )
    reduced = Moved(passes * times, passes * elements * size)
    stays = sum(u.bytes for u in units if u.stays and u.trained) if engine.gathers == "modules" else 0
    updated = stays if engine.gathers else elements * size if "states" in engine.divides else 0
    sums = 1 if engine.scatters else 2  # a sum that all receive is scattered, then gathered
    received = (forward.bytes + backward.bytes + updated + sums * reduced.bytes) * (n - 1) // n
    return Traffic(forward, backward, reduced, updated, received)


def _kept(units: list[Unit], visits: list[Visit], cards: Cards, accumulation: int) -> Kept | None:
    """Of frozen units that are gathered again in the backward pass; None where there are none."""
    if cards.engine.gathers != "blocks" or cards.processes == 1:
        return None
    again = [i for i in block_gathers(units, visits, spared=True).backward if not units[i].trained]
    if not again:
        return None
    held = sum(units[i].bytes for i in set(again))
    return Kept(len(set(again)), held, accumulation * sum(units[i].bytes for i in again))


def _assumed(cards: Cards, mixed: bool, step: Step) -> tuple[str, ...]:
    engine, said = cards.engine, []
    if mixed and engine.low == "gathered":
        said.append("what trains is stored in float32 and gathered in 16 bit, as Accelerate sets mixed precision")
    if mixed and engine.low == "stored":
        said.append("all weights are stored in 16 bit, and what trains has float32 copies in the optimizer")
    if engine.gathers == "blocks" and step.accumulation > 1:
        said.append("gradients are whole on every card until the last pass of a step")
    if engine.bucket:
        said.append(f"buckets of {engine.bucket:,} elements, DeepSpeed's default (reduce_bucket_size)")
    return (f"{cards.processes} cards, each with its own rows; {engine.title} with its defaults", *said)
