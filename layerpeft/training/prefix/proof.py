"""Is the answer the same when a pass begins at the cut? Asked of the first batch, which is computed whole, before others begin so.

Three things have to hold. Nothing below the cut draws random numbers. From what enters the cut alone the blocks above give out what
they gave out (nothing else goes upwards). And a row by itself enters the cut as it does among others, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.torch import tensors_of
from layerpeft.training.prefix.below import Below
from layerpeft.training.prefix.rows import Row, length
from layerpeft.training.prefix.running import Form, Running, random_states

RANDOM = "what runs below layer {} draws random numbers"
UPWARDS = "from what enters layer {} alone the model gives out something else: more than hidden states goes upwards"
TOGETHER = "a row by itself enters layer {} otherwise than among others: rows of a batch are not computed apart"
CHANGED = "what is kept of a row is not what enters layer {}"
# How far rows may differ in other batches, as a share of the largest number, by what another order of sums does.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
LOW = 5e-2


def drew(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    """Whether anything was drawn between these random states."""
    return len(before) != len(after) or not all(map(torch.equal, before, after))


def alike(a: torch.Tensor, b: torch.Tensor, low: bool = False) -> bool:
    """Whether two states are the same up to the order of sums, or to `low` precision."""
    if a.shape != b.shape:
        return False
    limit = LOW if low else ROUNDING.get(torch.promote_types(a.dtype, b.dtype), LOW)
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= limit * b.abs().max().clamp(min=1e-12)) if a.numel() else True


def fault(
    model: nn.Module,
    below: Below,
    inputs: Mapping[str, Any],
    rows: list[Row],
    entered: torch.Tensor,
    output: Any,
    forms: dict[int, Form],
    random: list[torch.Tensor],
    decoder: bool = False,
) -> str | None:
    """What is not as it must be, of a pass that gave out `output`, and began with these random states; None: all is."""
    with torch.no_grad(), _drawing_as(random, next(below.blocks(model)[0].parameters()).device):
        again = _from_cut(model, below, inputs, assembled(entered, rows), forms)
        upwards = again is None or not _same(output, again, rows, (entered.shape[0], entered.shape[1]))
        longest = max(rows, key=lambda row: (row.row, length(row)))
        together = not _alone(model, below, inputs, longest, entered, forms, decoder)  # by all processes, or by none
    return (UPWARDS if upwards else TOGETHER).format(below.cut) if upwards or together else None


def assembled(entered: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """The states of real tokens, with zeros at the places of padding."""
    found = torch.zeros_like(entered)
    for row in rows:
        found[row.row, row.places] = entered[row.row, row.places]
    return found


def _from_cut(
    model: nn.Module, below: Below, inputs: Mapping[str, Any], kept: torch.Tensor, forms: dict[int, Form]
) -> Any:
    running = Running(below.blocks(model), forms, lambda *_: kept)
    try:
        return model.forward(**inputs)
    except Exception:  # whatever blocks above miss, they may say it in any way
        return None
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


def _alone(
    model: nn.Module,
    below: Below,
    inputs: Mapping[str, Any],
    row: Row,
    entered: torch.Tensor,
    forms: dict[int, Form],
    decoder: bool,
) -> bool:
    """Whether this row enters the cut by itself as it did in its batch; a model that cannot be called so says nothing."""
    shape = entered.shape[0], entered.shape[1]
    own = {k: _own(k, v, row, shape, decoder) for k, v in inputs.items()}
    running = Running(below.blocks(model), dict(forms), lambda *_: None)
    with suppress(Exception):  # such as that of a model that wants as many pictures as there were
        model.forward(**own)
    running.close()
    found = running.entered
    return found is None or alike(found[0], entered[row.row, row.places])


def _own(name: str, value: Any, row: Row, shape: tuple[int, int], decoder: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if name == "position_ids" and value.dim() > 2:
        return value[:, row.row : row.row + 1, row.places]
    by_token = not decoder or name == "labels" or name.startswith("decoder_")
    if by_token and value.dim() > 1 and value.shape[1] == shape[1] and value.shape[0] in (1, shape[0]):
        at = min(row.row, len(value) - 1)
        return value[at : at + 1, row.places]
    return value[row.row : row.row + 1] if value.dim() and value.shape[0] == shape[0] else value


@contextmanager
def _drawing_as(random: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of the pass before; afterwards they go on as if nothing had been drawn."""
    then = random_states(device)
    _draw(random, device)
    try:
        yield
    finally:
        _draw(then, device)


def _draw(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
