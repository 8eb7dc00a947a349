"""Bytes and operations of one forward and backward pass, counted where they happen: over storages, by a dispatch mode."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from layerpeft.integrations.quantized import operations


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: peak bytes of what it makes besides gradients, and floating-point operations."""

    peak: int
    flops: int


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at the peak, and the operations (`flops`) of those that multiply.

    Storages that exist already do not count. torch's FlopCounterMode is not used beside it: its hooks keep alive what
    checkpointing has recomputed, and the peak would be that of no checkpointing.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.held, self.now, self.peak, self.flops = known, {}, 0, 0, 0
        self.formulas = _FORMULAS | operations()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.held:
                    self.held[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._drop, key)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)


def count(step: Callable[[], None], model: nn.Module, besides: Iterable[torch.Tensor] = ()) -> Pass:
    """Runs `step`, a forward and backward pass of `model` that starts without gradients, and counts it.

    `besides`: tensors that are there before, apart from the model's own.
    """
    live = Live({t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *besides]})
    with _no_collection(), live:
        step()
    return Pass(max(0, live.peak - gradient_bytes(model)), live.flops)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are there now."""
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's cycle collector still, so that the same model gives the same peak every time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    products = 2 * a.numel() * b.shape[-1]
    return (
        products // len(a) if a.dim() == 3 and b.dim() == 2 else products
    )  # each expert meets its own columns of b alone


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch counts the attention of every device but this one
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}
