"""Counts that do not depend on the machine: operations, bytes kept for backward, live bytes, gradients, optimizer states."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.arm import Ready
from layerpeft.planning.trace import Live


def counted(function: Callable[[], Any], known: Iterable[torch.Tensor]) -> Live:
    """Operations and peak live bytes of one call; `known` tensors are there already and do not count."""
    with watching(known) as live:
        function()
    return live


@contextmanager
def watching(known: Iterable[torch.Tensor]) -> Iterator[Live]:
    """Counts what happens inside; operations are those of matrix products and attention (torch knows of no formula for an SVD)."""
    with still(), Live({t.untyped_storage()._cdata for t in known}) as live:
        yield live


class WithoutTokens(TorchDispatchMode):
    """Numbers alive in matrices that have no dimension of tokens: gradients of weights and sketches of them, never activations.

    `sizes`: the lengths that a dimension of tokens may have. State: what is alive now, and the most at once.
    """

    def __init__(self, known: Iterable[torch.Tensor], sizes: Iterable[int]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.sizes, self.held, self.peak = set(sizes), {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or leaf.dim() < 2 or self.sizes & set(leaf.shape):
                continue
            key = leaf.untyped_storage()._cdata
            if leaf.is_floating_point() and key not in self.known and key not in self.held:
                self.held[key] = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.peak = max(self.peak, sum(self.held.values()))
                weakref.finalize(leaf.untyped_storage(), self.held.pop, key, None)
        return result


def counts(ready: Ready, batch: Mapping[str, torch.Tensor], number: int) -> dict[str, int]:
    """Every count of one optimizer step; optimizer states have to exist already.

    `flops` are those of the whole step, the optimizer's matrix products included. `kept_bytes`: alive after the forward pass, with
    the loss alone in hand. `peak_bytes`: most bytes alive in forward and backward, gradients included. `together_bytes`:
    weights, optimizer states and that peak.
    """
    ready.before_step(number)
    known = [*ready.model.parameters(), *ready.model.buffers(), *batch.values(), *tensors_in(ready.optimizer.state)]
    with watching(known) as live:
        loss = ready.model(**batch).loss
        kept = live.now
        loss.backward()
        peak = live.peak
        gradients = size(p.grad for p in ready.model.parameters() if p.grad is not None)
        ready.optimizer.step()
    found = {
        "trainable": sum(p.numel() for p in ready.model.parameters() if p.requires_grad),
        "flops": live.flops,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "gradient_bytes": gradients,
        "weight_bytes": size([*ready.model.parameters(), *ready.model.buffers()]),
    }
    ready.optimizer.zero_grad()
    found["optimizer_bytes"] = optimizer_bytes(ready.optimizer, ready.model)
    found["together_bytes"] = found["weight_bytes"] + found["optimizer_bytes"] + found["peak_bytes"]
    return found


def step(ready: Ready, batch: Mapping[str, torch.Tensor], number: int) -> None:
    """One optimizer step."""
    ready.before_step(number)
    ready.model(**batch).loss.backward()
    ready.optimizer.step()
    ready.optimizer.zero_grad()


def optimizer_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """Bytes of every tensor that can be reached from the optimizer's state, inside objects too (projections)."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return size([t for t in tensors_in(optimizer.state) if t.untyped_storage()._cdata not in own])


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_in(state: Any) -> list[torch.Tensor]:
    """Every tensor among the values of mappings and sequences, and in the attributes of objects; keys do not count."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting = [state]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, str | bytes | int | float | type(None)) or id(item) in seen:
            continue
        else:
            seen.add(id(item))
            inside = item.values() if isinstance(item, Mapping) else item
            inside = inside if isinstance(inside, Iterable) else getattr(item, "__dict__", {}).values()
            waiting += list(inside)
    return found


@contextmanager
def still() -> Iterator[None]:
    """Keeps Python's cycle collector from running in the middle of a count."""
    gc.collect()
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
