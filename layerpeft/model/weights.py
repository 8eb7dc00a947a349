"""Reading weights a piece at a time, whatever form they are stored in."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerpeft.integrations.engines.known import whole
from layerpeft.integrations.peft import dequantized
from layerpeft.integrations.torch import widest
from layerpeft.model.heads import HEAD, columns, holder
from layerpeft.model.layers import Target, find_module
from layerpeft.model.stacked import EXPERT, place_of

PIECE = 1 << 22  # elements read at a time, so that no weight is copied whole in float32


def matrices(model: nn.Module, target: Target) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, weight (out, in)) of a target in the type it is computed with; expert is 0 where there are none, or one alone is
    meant. Of a head: its columns.

    A weight of which each process holds a part is put together, for as long as it is read; every process must ask.
    """
    name, only = place_of(target.name) if target.kind == EXPERT else (target.name, None)
    module = find_module(model, holder(name))
    is_parameter = target.kind in ("experts", EXPERT, "parameter")
    held = getattr(module, name.rpartition(".")[2]) if is_parameter else dequantized(module)
    stored = whole(held).detach()
    if only is not None:
        yield 0, _turned(stored[only], target.shape)
        return
    if target.kind == "experts":
        for expert in range(target.shape[0]):
            yield expert, _turned(stored[expert], target.shape[1:])
        return
    rows = stored.T if isinstance(module, Conv1D) else stored.flatten(1)
    yield 0, rows[:, columns(target.name, target.shape[1])] if target.kind == HEAD else rows


def _turned(stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """One expert's matrix as (out, in)."""
    return stored if tuple(stored.shape) == shape else stored.T


def weight_slices(model: nn.Module, target: Target) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, rows) pieces of a target's weight in float32, rows (some, in); expert is 0 where there are none."""
    for expert, weight in matrices(model, target):
        yield from ((expert, rows) for rows in in_pieces(weight))


def in_pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Copies of some rows at a time (some, in), in float32."""
    step = max(1, PIECE // max(1, weight.shape[1]))
    yield from (weight[start : start + step].to(torch.float32, copy=True) for start in range(0, weight.shape[0], step))


def squared_norm(model: nn.Module, target: Target) -> float:
    """‖W‖² of a target's weight."""
    return sum(float(rows.double().square().sum()) for _, rows in weight_slices(model, target))


def squared_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖B·A‖² of factors (…, rank, in) and (…, out, rank), those of a stack summed: from products of the rank's size alone."""
    a, b = (t.detach().to(widest(t.device)) for t in (a, b))
    return float(((b.mT @ b) * (a @ a.mT)).sum())


# ---- how far weights are from what they were


def change_of(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """(‖after − before‖², ‖before‖²), a piece at a time."""
    change = weight = 0.0
    if before.numel() and before.stride() != after.stride():
        before, after = before.contiguous(), after.contiguous()
    where = after.device if before.device.type == "cpu" else before.device
    kind = widest(where)
    for a, b in zip(before.detach().reshape(-1).split(PIECE), after.detach().reshape(-1).split(PIECE), strict=True):
        was = a.to(where, kind)
        weight += float(was.square().sum())
        change += float((b.to(where, kind) - was).square().sum()) if before is not after else 0.0
    return change, weight
