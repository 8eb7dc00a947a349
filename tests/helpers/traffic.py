"""What passes through the layers of a model: forward calls, gradients that arrive, and what is computed a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from layerpeft import layer_map
from layerpeft.model.layers import base_of


@dataclass
class Traffic:
    """Calls by layer; `text` writes one digit per layer."""

    layers: int
    forward: Counter[int] = field(default_factory=Counter)  # with gradients enabled
    reached: Counter[int] = field(default_factory=Counter)  # gradients that arrived at the layer's output
    recomputed: Counter[int] = field(default_factory=Counter)  # runs of the layer during a backward pass

    def text(self, kind: str) -> str:
        counted = getattr(self, kind)
        return "".join(str(counted[i]) for i in range(self.layers))


def blocks_of(model: nn.Module, stack: str | None = None) -> list[nn.Module]:
    """The blocks of one stack."""
    return [base_of(model).get_submodule(layer.name) for layer in layer_map(model, stack).layers]


@contextmanager
def watched(model: nn.Module, stack: str | None = None) -> Iterator[Traffic]:
    """Counts what passes through the blocks of one stack while the context is open."""
    with watched_blocks(blocks_of(model, stack)) as seen:
        yield seen


@contextmanager
def watched_blocks(blocks: Sequence[nn.Module]) -> Iterator[Traffic]:
    """Counts what passes through these blocks. No backward hook is set on a module: the cut would step aside for it."""
    seen = Traffic(len(blocks))
    shared = Counter(id(m) for block in blocks for m in block.modules())
    handles = []
    for i, block in enumerate(blocks):
        own = [m for m in block.modules() if m is not block and shared[id(m)] == 1]
        first: list[nn.Module] = []

        def after(_m: nn.Module, _a: object, out: object, i: int = i) -> None:
            hidden = out[0] if isinstance(out, tuple | list) else out
            if torch.is_grad_enabled():
                seen.forward[i] += 1
                if hidden.requires_grad:
                    hidden.register_hook(lambda _g: seen.reached.update([i]))

        def inside(module: nn.Module, _a: object, i: int = i, first: list[nn.Module] = first) -> None:
            if not first:
                first.append(module)
            if module is first[0] and torch._C._current_graph_task_id() != -1:
                seen.recomputed[i] += 1

        handles += [block.register_forward_hook(after), *(m.register_forward_pre_hook(inside) for m in own)]
    yield seen
    for handle in handles:
        handle.remove()
