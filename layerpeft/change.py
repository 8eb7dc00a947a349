"""How far weights are from what they were."""

from __future__ import annotations

import torch

PIECE = 1 << 22  # elements that are turned into float64 at once


def change_of(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """(‖after − before‖², ‖before‖²), a piece at a time."""
    change = weight = 0.0
    if before.numel() and before.stride() != after.stride():
        before, after = before.contiguous(), after.contiguous()
    where = after.device if before.device.type == "cpu" else before.device
    kind = torch.float32 if where.type == "mps" else torch.float64
    for a, b in zip(before.detach().reshape(-1).split(PIECE), after.detach().reshape(-1).split(PIECE), strict=True):
        was = a.to(where, kind)
        weight += float(was.square().sum())
        change += float((b.to(where, kind) - was).square().sum()) if before is not after else 0.0
    return change, weight
