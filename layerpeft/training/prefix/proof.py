"""Is the answer the same when a pass begins at the cut? Asked of the first batch, which is computed whole, before others begin so.

Three things have to hold. Nothing below the cut draws random numbers. From what enters the cut alone the blocks above give out what
they gave out (nothing else goes upwards). And a row by itself enters the cut as it does among others, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.distributed import random_devices
from layerpeft.integrations.torch import tensors_of
from layerpeft.training.prefix.passing import Pass
from layerpeft.training.prefix.rows import Row, assembled, by_token, length
from layerpeft.training.prefix.running import Running

UPWARDS = "from what enters layer {} alone the model gives out something else: more than hidden states goes upwards"
TOGETHER = "a row by itself enters layer {} otherwise than among others: rows of a batch are not computed apart"
CHANGED = "what is kept of a row is not what enters layer {}"
# How far rows may differ in other batches, as a share of the largest number, by what another order of sums does.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
LOW = 5e-2


def alike(a: torch.Tensor, b: torch.Tensor, low: bool = False) -> bool:
    """Whether two states are the same up to the order of sums, or to `low` precision."""
    if a.shape != b.shape:
        return False
    limit = LOW if low else ROUNDING.get(torch.promote_types(a.dtype, b.dtype), LOW)
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= limit * b.abs().max().clamp(min=1e-12)) if a.numel() else True


def fault(model: nn.Module, now: Pass, output: Any) -> str | None:
    """What is not as it must be, of a pass that was computed whole and gave out `output`; None: all is."""
    entered, cut = now.running.entered, now.below.cut
    assert entered is not None
    with torch.no_grad(), _drawing_as(now.random, now.device):
        upwards = not _from_cut(model, now, entered, output)
        together = not _alone(model, now, entered)  # by all processes, or by none
    return (UPWARDS if upwards else TOGETHER).format(cut) if upwards or together else None


def _from_cut(model: nn.Module, now: Pass, entered: torch.Tensor, output: Any) -> bool:
    """Whether the model gives out the same from the states of real tokens that entered the cut."""
    shape = entered.shape[0], entered.shape[1]
    kept = assembled(now.rows, [entered[row.row, row.places] for row in now.rows], shape, entered.device)
    running = Running(now.below.blocks(model), now.forms, lambda *_: kept)
    try:
        return _same(output, model.forward(**now.inputs), now.rows, shape)
    except Exception:  # whatever blocks above miss, they may say it in any way
        return False
    finally:
        running.close()


def _same(output: Any, again: Any, rows: list[Row], shape: tuple[int, int]) -> bool:
    ours, theirs = tensors_of(output), tensors_of(again)
    if len(ours) != len(theirs):
        return False
    real = torch.zeros(shape, dtype=torch.bool)
    for row in rows:
        real[row.row, row.places] = True
    return all(_equal(a, b, real) for a, b in zip(ours, theirs, strict=True))


def _equal(a: torch.Tensor, b: torch.Tensor, real: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.dim() > 2 and a.shape[0] == real.shape[0] and a.shape[1] <= real.shape[1]:  # the last tokens' logits
        here = real[:, -a.shape[1] :].to(a.device)
        a, b = a[here], b[here]
    if a.device.type == "cpu":
        return torch.equal(a, b)
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)  # kernels there may add up in any order


def _alone(model: nn.Module, now: Pass, entered: torch.Tensor) -> bool:
    """Whether the last row enters the cut by itself as it did in its batch, or the longest text of it; a model that cannot be
    called so says nothing."""
    row = longest(now.rows)
    shape = entered.shape[0], entered.shape[1]
    alone = {k: own(k, v, row, shape, now.keyed.decoder) for k, v in now.inputs.items()}
    running = Running(now.below.blocks(model), dict(now.forms), lambda *_: None)
    with suppress(Exception):  # such as that of a model that wants as many pictures as there were
        model.forward(**alone)
    running.close()
    found = running.entered
    return found is None or alike(found[0], entered[row.row, row.places])


def longest(rows: Sequence[Row]) -> Row:
    """The last row of a batch, or the longest text of it."""
    return max(rows, key=lambda row: (row.row, length(row)))


def own(name: str, value: Any, row: Row, shape: tuple[int, int], decoder: bool) -> Any:
    """What a model is called with by this name, of one row alone."""
    if not isinstance(value, torch.Tensor):
        return value
    if name == "position_ids" and value.dim() > 2:
        return value[:, row.row : row.row + 1, row.places]
    ours = not decoder or name == "labels" or name.startswith("decoder_")
    if ours and by_token(value, shape):
        at = min(row.row, len(value) - 1)
        return value[at : at + 1, row.places]
    return value[row.row : row.row + 1] if value.dim() and value.shape[0] == shape[0] else value


@contextmanager
def _drawing_as(random: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of the pass before; afterwards they go on as if nothing had been drawn."""
    devices, kind = random_devices({device})
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.set_rng_state(random[0])
        for state in random[1:]:
            torch.get_device_module(device).set_rng_state(state, device)
        yield
