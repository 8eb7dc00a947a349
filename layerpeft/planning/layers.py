"""What layers cost where that does not follow from shapes: bytes of every model, operations of some. From traces of plans.

A few passes are traced, with marks at the layers: all train, the first alone trains, the last of each kind alone trains. What a
layer takes in each of these states is the same whatever else trains, so that any set of layers is a sum of them. Another set is
traced beside its sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from layerpeft.errors import LayerMapError, LayerpeftError
from layerpeft.integrations.tracing import as_traced, is_stand_in
from layerpeft.model.costs import Costs, LayerCost
from layerpeft.model.layers import Layer, LayerMap, base_of
from layerpeft.model.memory import Below, LayerBytes, Memory, Span
from layerpeft.planning.parts import training
from layerpeft.planning.plan import wrapped
from layerpeft.planning.trace import Part, Step, parted, recompute
from layerpeft.selection.budget import Budget, Shape
from layerpeft.selection.scoring import HANDED
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.soft import choosing_by

APART = 0.02  # of what a set of layers takes, the most that a sum of operations may be beside a trace
_KNOWN: dict[str, Costs | Memory] = {}  # by what was counted
_MOST = 8


@dataclass(frozen=True)
class _Pass:
    """One in which the `chosen` train: its parts by place, the bytes of weights and states, of all together, and its operations."""

    chosen: tuple[int, ...]
    parts: Mapping[tuple[str, int], Part]
    lasting: int
    bytes: int
    flops: int

    def span(self, layer: int) -> Span:
        """What a layer does to the bytes that are there."""
        there, back = self.parts["forward", layer], self.parts["backward", layer]
        return Span(there.end - there.start, there.peak - there.start, back.peak - back.start, back.end - back.start)

    def operations(self, layer: int) -> int:
        """Those of a layer, there and back."""
        return sum(self.parts[way, layer].flops for way in ("forward", "backward") if (way, layer) in self.parts)

    def below(self, layer: int) -> Below:
        """What is there before a layer."""
        places = list(self.parts)
        before = [self.parts[place].peak for place in places[: places.index(("forward", layer))]]
        return Below(self.parts["forward", layer].start, max(before, default=0))


def traced(config: LayerLoraConfig, model: nn.Module, layers: LayerMap, budget: Budget | None) -> Costs | Memory:
    """What training these layers by this config takes: bytes where the budget is one of those, operations of a row otherwise.

    Raises: LayerMapError where that cannot be traced.
    """
    memory = budget is not None and budget.of == "memory"
    shape = budget.shape if budget is not None else Shape()
    shape = shape if memory else Shape(rows=1, length=shape.length)
    key = _key(config, model, layers, shape, memory)
    if key not in _KNOWN:
        while len(_KNOWN) >= _MOST:
            del _KNOWN[next(iter(_KNOWN))]
        try:
            passes = partial(_pass, config, model, layers, shape, _step(model, shape))
            _KNOWN[key] = _summed(passes, [_kind(model, layer) for layer in layers.layers], memory)
        except LayerMapError:
            raise
        except LayerpeftError as error:
            raise LayerMapError(f"{type(base_of(model)).__name__} cannot be traced ({error})") from error
    return _KNOWN[key]


HANDED["costs"] = traced


def _summed(run: Callable[[Sequence[int]], _Pass], kinds: Sequence[Any], memory: bool) -> Costs | Memory:
    """Of layers of these kinds."""
    count = len(kinds)
    last = {kind: i for i, kind in enumerate(kinds)}
    alone = {i: run([i]) for i in sorted({0, *last.values()})}
    every = run(range(count)) if count > 1 else alone[0]
    make = _memory if memory else _costs
    found = make([alone.get(i, alone[last[kind]]) for i, kind in enumerate(kinds)], every)
    others = [sorted({*range(1, count, 2), count - 1}), [*range((count + 1) // 2)]] if count > 2 else []
    more = [every, *map(run, others)]
    if isinstance(found, Memory):
        # more than those lack, since others may lack more
        return replace(found, slack=1.25 * max(0.0, *(p.bytes / found.of(p.chosen) - 1 for p in more)))
    if worst := [p for p in more if abs(found.of(p.chosen) - p.flops) > APART * p.flops]:
        few = ", ".join(map(str, worst[0].chosen))
        raise LayerMapError(f"what layers take does not add up (of layers {few}): some go with what trains in others")
    return found


def _memory(alone: Sequence[_Pass], every: _Pass) -> Memory:
    """`alone`: by layer, a pass in which it, or the last one of its kind, alone trains."""
    first, last, count = alone[0], alone[-1], len(alone)
    own = [run.chosen[0] for run in alone]
    base = (sum(run.lasting for run in alone) - every.lasting) // (count - 1) if count > 1 else first.lasting
    found = []
    for i, run in enumerate(alone):
        lowest = run.span(own[i])
        others = (first.span(i), every.span(i)) if i else (lowest, lowest)
        found.append(LayerBytes(*others, lowest, run.lasting - base))
    head = last.parts["after", count - 1]
    below = tuple(last.below(i) for i in range(count))
    plain = Memory(base, below, (head.peak - head.start, head.end - head.start), tuple(found))
    besides = {run.chosen[0]: run.bytes - int(plain.of(run.chosen)) for run in alone}
    return replace(plain, below=tuple(b._replace(besides=besides[own[i]]) for i, b in enumerate(below)))


def _costs(alone: Sequence[_Pass], every: _Pass) -> Costs:
    """As `_memory`."""
    first, last, count = alone[0], alone[-1], len(alone)
    found = []
    for i, run in enumerate(alone):
        lowest = run.operations(run.chosen[0])
        frozen, trained = (first.operations(i), every.operations(i)) if i else (lowest, lowest)
        below = last.operations(i) if i < count - 1 else first.parts["forward", i].flops
        found.append(LayerCost(below, frozen - below, 0, trained - frozen, trained - lowest))
    outside = last.flops - sum(last.operations(i) for i in range(count))
    plain = Costs(0, outside, tuple(found))
    besides = {run.chosen[0]: run.flops - plain.of(run.chosen) for run in alone}
    return replace(
        plain,
        layers=tuple(replace(c, saved=c.saved - besides[run.chosen[0]]) for c, run in zip(found, alone, strict=True)),
    )


def _pass(
    config: LayerLoraConfig, model: nn.Module, layers: LayerMap, shape: Shape, step: Step, chosen: Sequence[int]
) -> _Pass:
    placed = choosing_by(config, {"layers": list(chosen), "stack": layers.stack})
    found, _ = wrapped(model, placed, [], step)
    cost = training(found, shape.optimizer, None)
    with torch.device("cpu"), as_traced(found.model):
        if shape.checkpointing and not recompute(found.model, step):
            raise LayerMapError(f"{type(base_of(model)).__name__} has no gradient checkpointing")
        blocks = [base_of(found.model).get_submodule(name) for name in layers.names]
        live, gradients = parted(found.model, shape.rows, shape.length, step, None, blocks)
    parts = {part.place: part for part in live.parts[:-1]}
    if ("backward", min(chosen)) not in parts:
        raise LayerMapError(f"no gradient comes to layer {min(chosen)} in a step that is traced")
    most = max(live.peak, gradients)
    lasting = found.weights + cost.masters + cost.states + cost.gradients - gradients
    return _Pass(tuple(chosen), parts, lasting, lasting + most, live.flops)


def _step(model: nn.Module, shape: Shape) -> Step:
    """As the plan of that training would run it."""
    base = base_of(model)
    asked = getattr(getattr(base, "config", None), "quantization_config", None)
    packed = asked if isinstance(asked, BitsAndBytesConfig) and not any(map(is_stand_in, base.modules())) else None
    return Step(
        autocast=getattr(torch, shape.precision) if shape.precision is not None else None,
        fused_head=shape.fused_head,
        in_place=shape.fused_head and torch.accelerator.is_available(),
        padded=shape.padded,
        quantization=packed,
    )


def _kind(model: nn.Module, layer: Layer) -> Any:
    """What layers share that take the same."""
    block = base_of(model).get_submodule(layer.name)
    modules = tuple((name, type(module).__name__) for name, module in block.named_modules())
    return modules, tuple((name, tuple(p.shape)) for name, p in block.named_parameters(remove_duplicate=False))


def _key(config: LayerLoraConfig, model: nn.Module, layers: LayerMap, shape: Shape, memory: bool) -> str:
    base: Any = base_of(model)
    about: Any = getattr(base, "config", None)
    said = about.to_json_string(use_diff=False) if hasattr(about, "to_json_string") else id(base)
    attention = getattr(about, "_attn_implementation", None)
    options = {k: v for k, v in config.to_dict().items() if k != "select"}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in options.items()}
    packed = any(map(is_stand_in, base.modules()))
    kind = next(base.parameters()).dtype
    return repr((type(base), said, attention, packed, kind, layers.stack, layers.fingerprint, plain, shape, memory))
