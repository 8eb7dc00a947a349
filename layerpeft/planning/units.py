"""Weights that an engine gathers together, and when one forward and backward pass needs them: seen in a trace, by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.integrations.torch import running_backward, tensors_of
from layerpeft.integrations.tracing import is_stand_in
from layerpeft.model.layers import base_of
from layerpeft.planning.engines import Cards

# a unit is entered and left in the forward pass, entered again where it is recomputed, needed when a gradient arrives at its output
Kind = Literal["enter", "leave", "again", "done", "need"]
Visit = tuple[Kind, int]


@dataclass(frozen=True)
class Unit:
    """`elements`: of the whole, as it is gathered, and `bytes` of those; `trained`: elements that train among them.
    `modules`: what runs with them; `stays`: is not given back after the forward pass; `lasts`: nor after its own backward pass.
    `own`: elements without what fills up the parts."""

    name: str
    modules: tuple[nn.Module, ...]
    elements: int
    bytes: int
    trained: int
    stays: bool
    lasts: bool
    own: int


@dataclass(frozen=True)
class Gathers:
    """Units in the order in which they are gathered, by their place, and the most bytes that are whole at one time."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    peak: int


# ---- what is gathered together --------------------------------------------------------------------------------------


def by_block(model: nn.Module, cards: Cards, fused_head: bool) -> list[Unit]:
    """As Accelerate wraps a model for FSDP2: each block, the embeddings, the head, and the rest; cut along dimension 0."""
    base: Any = base_of(model)
    kinds: set[str] = {*(getattr(base, "_no_split_modules", None) or ())}
    given = getattr(base, "get_input_embeddings", lambda: None)()
    head = getattr(base, "get_output_embeddings", lambda: None)()
    tied = head is not None and getattr(given, "weight", 0) is getattr(head, "weight", 1)
    groups = [((m,), False) for _, m in _outermost(base, kinds)]
    groups += [] if tied or given is None else [((given,), False)]
    groups += [((given, head), True) if tied else ((head,), True)] if head is not None else []
    names = {id(m): n for n, m in model.named_modules()}
    found, taken = [], set[int]()
    for modules, stays in [*groups, ((model,), True)]:
        held = [p for m in modules for p in _weights(m) if id(p) not in taken]
        taken |= {id(p) for p in held}
        if held:
            read = modules == (head,) and fused_head  # TRL's loss reads the weight, and the module does not run
            runs = (model,) if read else modules
            lasts = model in runs or len(modules) > 1
            found.append(_unit(names[id(modules[0])], runs, held, partial(_rows, cards.processes), stays, lasts))
    return found


def by_module(model: nn.Module, cards: Cards, fused_head: bool) -> list[Unit]:
    """As ZeRO-3 hooks a model: each module with its own weights, those with a few elements apart, which stay whole."""
    head = getattr(base_of(model), "get_output_embeddings", lambda: None)()
    found, taken = [], set[int]()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in taken and not is_stand_in(module)]
        taken |= {id(p) for p in own}
        runs = (model,) if module is head and fused_head else (module,)
        for stays in (False, True):
            held = [p for p in own if (p.numel() <= cards.engine.persistent) == stays]
            if held:
                found.append(_unit(name, runs, held, partial(_flat, cards.processes), stays, stays))
    return found


def _unit(
    name: str, modules: tuple[nn.Module, ...], held: Sequence[nn.Parameter], cut: Any, stays: bool, lasts: bool
) -> Unit:
    sizes = [cut(p.shape) for p in held]
    return Unit(
        name or "the rest",
        modules,
        sum(sizes),
        sum(n * p.element_size() for n, p in zip(sizes, held, strict=True)),
        sum(n for n, p in zip(sizes, held, strict=True) if p.requires_grad),
        stays,
        lasts,
        sum(p.numel() for p in held),
    )


def part_of(shape: torch.Size, processes: int, gathers: str | None) -> tuple[int, ...]:
    """The shape of the first process's part, which is the largest, with what fills it up."""
    if gathers == "blocks":
        return (-(-shape[0] // processes), *shape[1:]) if shape else (1,)
    return (-(-prod(shape) // processes),)


def _rows(processes: int, shape: torch.Size) -> int:
    return processes * prod(part_of(shape, processes, "blocks"))


def _flat(processes: int, shape: torch.Size) -> int:
    return processes * prod(part_of(shape, processes, "modules"))


def _outermost(base: nn.Module, kinds: set[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in base.named_children():
        if type(module).__name__ in kinds:
            yield name, module
        else:
            yield from _outermost(module, kinds)


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    for child in module.modules():
        if not is_stand_in(child):  # packed weights are left out of what is divided
            yield from child.parameters(recurse=False)


# ---- when they are needed -------------------------------------------------------------------------------------------


@contextmanager
def watching(units: Sequence[Unit]) -> Iterator[list[Visit]]:
    """The visits of what runs while the context is open. No module gets a backward hook: the cut would step aside for it."""
    visits: list[Visit] = []
    handles = []
    for i, unit in enumerate(units):
        for module in unit.modules:
            handles.append(module.register_forward_pre_hook(partial(_before, visits, i)))
            handles.append(module.register_forward_hook(partial(_after, visits, i)))
    try:
        yield visits
    finally:
        for handle in handles:
            handle.remove()


def _before(visits: list[Visit], i: int, *_: Any) -> None:
    visits.append(("enter" if running_backward() is None else "again", i))


def _after(visits: list[Visit], i: int, _module: nn.Module, _args: Any, output: Any) -> None:
    inside = running_backward() is not None
    visits.append(("done" if inside else "leave", i))
    heard: list[bool] = []

    def arrived(_: torch.Tensor) -> None:
        if not heard:
            heard.append(True)
            visits.append(("need", i))

    for tensor in tensors_of(output):
        if tensor.requires_grad:
            tensor.register_hook(arrived)


# ---- what an engine makes of it -------------------------------------------------------------------------------------


def block_gathers(units: Sequence[Unit], visits: Iterable[Visit], spared: bool) -> Gathers:
    """FSDP2's: a unit is whole while it runs, and gathered again where its gradient is due; what `stays` is whole in between.

    In the backward pass the unit that ran before comes early, with the one that is due; `spared`: unless its own will not be.
    """
    seen = list(visits)
    due = {i for kind, i in seen if kind in ("need", "again")}
    held, ran, forward, backward, early, last, peak = set[int](), list[int](), list[int](), list[int](), -1, -1, 0
    for kind, i in seen:
        if kind == "leave":
            ran.append(i)
            held -= set() if units[i].stays else {i}
        if kind in ("leave", "done"):
            continue
        if kind != "enter" and last not in (-1, i) and not units[last].lasts:
            held.discard(last)  # its backward pass is over
        if i not in held or kind == "need" and i == last and not units[i].stays:
            (forward if kind == "enter" else backward).append(i)
        held.add(i)
        peak = max(peak, sum(units[j].bytes for j in held))
        if kind == "need":
            place = len(ran) - 1 - ran[::-1].index(i) if i in ran else 0
            early, last, ran = ran[place - 1] if place else -1, i, ran[:place] if i in ran else ran
            if early >= 0 and early not in held and (early in due or not spared):
                backward.append(early)
                held.add(early)
    return Gathers(tuple(forward), tuple(backward), peak)


def module_gathers(units: Sequence[Unit], visits: Iterable[Visit], reuse: int) -> Gathers:
    """ZeRO-3's once it has seen a step: a unit stays whole where it is used again within so many elements (`reuse`)."""
    seen = list(visits)
    order = [i for kind, i in seen if kind in ("enter", "again", "need")]
    passed = list(accumulate((units[i].own for i in order), initial=0))
    following, later = [len(order)] * len(order), dict[int, int]()
    for place in reversed(range(len(order))):
        following[place] = later.get(order[place], len(order))
        later[order[place]] = place
    held = {i for i, unit in enumerate(units) if unit.stays}
    peak = whole = sum(units[i].bytes for i in held)
    forward, backward, place, last = list[int](), list[int](), -1, -1

    def release(i: int) -> None:
        nonlocal whole
        soon = following[last_use[i]] < len(order) and passed[following[last_use[i]]] - passed[place + 1] < reuse
        if i in held and not units[i].stays and not soon:
            held.discard(i)
            whole -= units[i].bytes

    last_use = dict[int, int]()
    for kind, i in seen:
        if kind in ("leave", "done"):
            release(i)
            continue
        if kind == "need" and last >= 0 and last != i:
            release(last)
        place += 1
        last_use[i], last = place, i if kind == "need" else -1
        if i not in held:
            (forward if kind == "enter" else backward).append(i)
            held.add(i)
            whole += units[i].bytes
            peak = max(peak, whole)
    return Gathers(tuple(forward), tuple(backward), peak)
