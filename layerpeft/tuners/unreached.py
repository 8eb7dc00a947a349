"""Zeros as the gradients of experts that no token has reached, as they have where all experts of a layer train together.

Without them an optimizer would pass such an expert over, one process would do otherwise than several, and DDP would wait for it.
"""

from collections.abc import Sequence
from typing import Any

import torch


def with_zeros(y: torch.Tensor, unreached: Sequence[torch.Tensor]) -> torch.Tensor:
    """y (…, out) as it is; in the backward pass these get zeros."""
    return _Zeros.apply(y, *unreached) if unreached else y  # type: ignore[return-value]


class _Zeros(torch.autograd.Function):
    """The identity on y."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, *unreached: torch.Tensor) -> torch.Tensor:
        ctx.like = [(p.shape, p.dtype) for p in unreached]
        return y.data

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], *(grads[0].new_zeros((), dtype=kind).expand(shape) for shape, kind in ctx.like)
