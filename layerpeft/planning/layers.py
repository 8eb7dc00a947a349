"""What layers cost beyond operations that follow from shapes: bytes of a step, and operations of some models. From traces of plans.

A pass is traced with marks at the layers. What a layer takes is the same whatever else trains, so that any set of layers is a sum.
What it keeps is known in closed form where blocks are written like known ones: then two passes say whether that is so within 2 %,
of every layer, and what is highest on the way. Otherwise all of it comes from traces: all layers train, the first alone, the last
of each kind alone; and two more sets are traced beside their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from layerpeft.errors import LayerMapError, LayerpeftError
from layerpeft.integrations.tracing import as_traced, is_stand_in
from layerpeft.model.architectures import text_config
from layerpeft.model.costs import Costs, LayerCost, LayerKept, kept_of
from layerpeft.model.layers import Layer, LayerMap, base_of
from layerpeft.model.load import Load
from layerpeft.model.memory import Below, LayerBytes, Memory, Span
from layerpeft.planning.parts import training
from layerpeft.planning.plan import wrapped
from layerpeft.planning.trace import Part, Step, parted, recompute
from layerpeft.selection.budget import Budget, Shape
from layerpeft.selection.scoring import HANDED
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.soft import choosing_by

LEAST = 5e-4  # of what a set of layers takes, the least that others are taken to lack
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
            passes = cache(partial(_pass, config, model, layers, shape, _step(model, shape)))
            kinds = [_kind(model, layer) for layer in layers.layers]
            whole = config.quantize_frozen is None or config.quantize_trained is not None
            found = _from_shapes(passes, kinds, _kept(config, model, layers, shape), whole) if memory else None
            _KNOWN[key] = found or _summed(passes, kinds, memory, whole)
        except LayerMapError:
            raise
        except LayerpeftError as error:
            raise LayerMapError(f"{type(base_of(model)).__name__} cannot be traced ({error})") from error
    return _KNOWN[key]


HANDED["costs"] = traced


_Run = Callable[[tuple[int, ...]], _Pass]


def _kept(config: LayerLoraConfig, model: nn.Module, layers: LayerMap, shape: Shape) -> list[tuple[LayerKept, ...]]:
    """What layers keep in closed form, with norms that round before they weigh, and after; nothing where it is not known."""
    low = getattr(torch, shape.precision).itemsize if shape.precision is not None else 0
    load = Load(shape.rows, shape.length, shape.checkpointing, low=low, padded=shape.padded)
    targets, work = config.targets_in(model, layers), config.works_by.work(config)
    try:
        return [kept_of(model, layers, targets, load, work, late) for late in (False, True)]
    except LayerMapError:
        return []


def _from_shapes(run: _Run, kinds: Sequence[Any], forms: Sequence[tuple[LayerKept, ...]], whole: bool) -> Memory | None:
    """From what layers keep in closed form, and two passes; None where these do not agree with any of the forms.

    Few layers with several kinds of attention take more passes, until each kind was seen to train and to rest.
    """
    count = len(kinds)
    if not forms or count < 3 or len({weights for _, weights, _ in kinds}) > 1:
        return None
    some, last = run(tuple(i for i in range(count) if i % 4 < 2)), run((count - 1,))
    shown = [some]
    if {*kinds[1:]} > {kinds[i] for i in some.chosen[1:]}:
        if not whole:
            return None
        shown.append(run((*range(count),)))
    if {*kinds[1:]} > {kinds[i] for i in range(1, count) if i not in some.chosen}:
        shown.append(run((0,)))
    for form in forms:
        if not all(_agrees(form, passed) for passed in (some, last)):
            continue
        plain = _by_form(form, shown, last, kinds)
        besides = [p.bytes - int(plain.of(p.chosen)) for p in (some, last)]
        entering = _entering(last)
        if any(abs(n) > APART * p.bytes + entering for n, p in zip(besides, (some, last), strict=True)):
            return None
        # the model lets go of what the first layer reads above all layers, unless that layer needs it on the way back
        besides[0] = max(besides[0], 0 if form[0].let_go[2] else entering)
        below = tuple(b._replace(besides=besides[i > 0]) for i, b in enumerate(plain.below))
        found = replace(plain, below=below)
        others = {kind: (i,) for i, kind in enumerate(kinds) if kind != kinds[-1]} if len({*kinds}) > 1 else {}
        lack = max([0.0, *(run(i).bytes / found.of(i) - 1 for i in others.values())])
        return replace(found, slack=1.25 * lack) if lack <= APART else None
    return None


def _entering(last: _Pass) -> int:
    """Bytes of what the first layer reads, where the model holds on to them until all layers are through."""
    return last.parts["forward", 1].start - last.parts["forward", 0].start


def _agrees(form: Sequence[LayerKept], passed: _Pass) -> bool:
    """Whether every layer of a pass kept what the form says, and no more of what it read."""
    lowest = min(passed.chosen)
    for i, layer in enumerate(form[lowest:], lowest):
        said, gone = layer.lowest, layer.let_go[2]
        if i > lowest:
            said, gone = (layer.trained, layer.let_go[1]) if i in passed.chosen else (layer.frozen, layer.let_go[0])
        there, after = passed.span(i).kept, passed.parts["after", i]
        # what the model holds besides, and what goes above the last layer, is not the layers' own
        still = after.end - after.start + gone if 0 < i < len(form) - 1 else 0
        if abs(said - there) > APART * there or still > APART * there:
            return False
    return True


def _by_form(form: Sequence[LayerKept], shown: Sequence[_Pass], last: _Pass, kinds: Sequence[Any]) -> Memory:
    """`shown`: passes in which layers of all states are; `last`: one in which the last one alone trains."""
    count, some = len(form), shown[0]
    frozen = _highest((kinds[i], p.span(i)) for p in shown for i in range(1, count) if i not in p.chosen)
    trained = _highest((kinds[i], p.span(i)) for p in shown for i in p.chosen[1:])
    lowest = {kinds[-1]: last.span(count - 1)}
    own = (some.lasting - last.lasting) // (len(some.chosen) - 1)
    found = []
    for i, (kind, kept) in enumerate(zip(kinds, form, strict=True)):
        # of a kind of attention that was not seen as the lowest one, another stands for what is highest on the way
        states = (frozen, trained, lowest if i else {kind: some.span(0)})
        spans = [seen.get(kind, next(iter(seen.values()))) for seen in states]
        gone = kept.let_go if i or not _entering(last) else (0, 0, 0)
        of_form = map(_keeping, (kept.frozen, kept.trained, kept.lowest), gone, spans)
        found.append(LayerBytes(next(of_form), next(of_form), next(of_form), own))
    head, gone = last.parts["after", count - 1], form[-1].let_go[2]
    top = head.peak + gone if head.peak > head.start else head.end + gone  # above what is left of the last layer
    below = tuple(last.below(i) for i in range(count))
    return Memory(last.lasting - own, below, (top - head.start, head.end + gone - head.start), tuple(found))


def _highest(spans: Iterable[tuple[Any, Span]]) -> dict[Any, Span]:
    """One of each kind, as high on the way as any of them."""
    found: dict[Any, Span] = {}
    for kind, span in spans:
        seen = found.get(kind, span)
        found[kind] = replace(seen, peak=max(seen.peak, span.peak), back=max(seen.back, span.back))
    return found


def _keeping(kept: int, gone: int, span: Span) -> Span:
    """`gone`: what is let go when the next layer begins."""
    more = kept - span.kept
    return Span(kept - gone, span.peak + max(0, more), span.back, span.left - more)


def _summed(run: _Run, kinds: Sequence[Any], memory: bool, whole: bool) -> Costs | Memory:
    """Of layers of these kinds, from traces alone; `whole`: all of them can train together."""
    count = len(kinds)
    last = {kind: i for i, kind in enumerate(kinds)}
    alone = {i: run((i,)) for i in sorted({0, *last.values()})}
    # one that is left out has a twin among the others
    spare = [i for i in range(1, count) if kinds[i] in kinds[1:i]][-1:] if not whole else []
    every = run(tuple(i for i in range(count) if i not in spare)) if count > 1 else alone[0]
    make = _memory if memory else _costs
    twins = [i if i not in spare else kinds.index(kinds[i], 1) for i in range(count)]
    found = make([alone.get(i, alone[last[kind]]) for i, kind in enumerate(kinds)], every, twins)
    others = [sorted({*range(1, count, 2), count - 1}), [*range((count + 1) // 2)]] if count > 2 else []
    more = [every, *(run(tuple(chosen)) for chosen in others)]
    if isinstance(found, Memory):
        # more than those lack, since others may lack more
        return replace(found, slack=1.25 * max(LEAST, *(p.bytes / found.of(p.chosen) - 1 for p in more)))
    if worst := [p for p in more if abs(found.of(p.chosen) - p.flops) > APART * p.flops]:
        few = ", ".join(map(str, worst[0].chosen))
        raise LayerMapError(f"what layers take does not add up (of layers {few}): some go with what trains in others")
    return found


def _memory(alone: Sequence[_Pass], every: _Pass, twins: Sequence[int]) -> Memory:
    """`alone`: by layer, a pass in which it, or the last one of its kind, alone trains; `twins`: by layer, one that trains in
    `every` and takes the same."""
    first, last, count = alone[0], alone[-1], len(alone)
    own = [run.chosen[0] for run in alone]
    together = sum(alone[i].lasting for i in every.chosen) - every.lasting
    base = together // (len(every.chosen) - 1) if len(every.chosen) > 1 else first.lasting
    found = []
    for i, run in enumerate(alone):
        lowest = run.span(own[i])
        others = (first.span(i), every.span(twins[i])) if i else (lowest, lowest)
        found.append(LayerBytes(*others, lowest, run.lasting - base))
    head = last.parts["after", count - 1]
    below = tuple(last.below(i) for i in range(count))
    plain = Memory(base, below, (head.peak - head.start, head.end - head.start), tuple(found))
    besides = {run.chosen[0]: run.bytes - int(plain.of(run.chosen)) for run in alone}
    return replace(plain, below=tuple(b._replace(besides=besides[own[i]]) for i, b in enumerate(below)))


def _costs(alone: Sequence[_Pass], every: _Pass, twins: Sequence[int]) -> Costs:
    """As `_memory`."""
    first, last, count = alone[0], alone[-1], len(alone)
    found = []
    for i, run in enumerate(alone):
        lowest = run.operations(run.chosen[0])
        frozen, trained = (first.operations(i), every.operations(twins[i])) if i else (lowest, lowest)
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
    config: LayerLoraConfig, model: nn.Module, layers: LayerMap, shape: Shape, step: Step, chosen: tuple[int, ...]
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
    return _Pass(chosen, parts, lasting, lasting + most, live.flops)


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


def _kind(model: nn.Module, layer: Layer) -> tuple[Any, Any, Any]:
    """What layers share that take the same: modules, weights, and how attention looks back."""
    block = base_of(model).get_submodule(layer.name)
    modules = tuple((name, type(module).__name__) for name, module in block.named_modules())
    attends = getattr(text_config(base_of(model)), "layer_types", None)
    weights = tuple((name, tuple(p.shape)) for name, p in block.named_parameters(remove_duplicate=False))
    return modules, weights, attends[layer.index] if attends and layer.index < len(attends) else None


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
