"""Bytes of optimizer state by the names of transformers' `optim`: one formula per optimizer, for one trained tensor each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod

import torch

from layerpeft.errors import ConfigError, hint

Arguments = Mapping[str, str]
Formula = Callable[[torch.Size, int, Arguments], int]

SMALLEST_QUANTIZED = 4096  # bitsandbytes and torchao keep the states of smaller tensors whole
BLOCK = 256
CODE_BYTES = 1024  # bitsandbytes: 256 float32 for each kind of number, shared by all tensors


def state_bytes(name: str, trained: Iterable[torch.Tensor], optim_args: str | None = None) -> int:
    """Bytes that the optimizer `name` keeps for these tensors, besides the tensors themselves; scalars are left out.
    `optim_args` as in TrainingArguments ("momentum=0.9"). Raises: ConfigError for a name without a formula."""
    if sentence := problem(name):
        raise ConfigError(sentence)
    given = dict(re.findall(r"\s*(\w+)\s*=\s*([^,]+)", optim_args or ""))
    tensors = list(trained)
    total = sum(STATES[name](t.shape, t.element_size(), given) for t in tensors)
    if name in _CODES and any(t.numel() >= SMALLEST_QUANTIZED for t in tensors):
        total += _CODES[name] * CODE_BYTES
    return total


def problem(name: str) -> str | None:
    """Why nothing can be said about an optimizer, as a sentence, or None where there is a formula."""
    if name in STATES:
        return None
    for start, reason in (_ON_FULL_WEIGHTS | _REFUSED).items():
        if name.startswith(start):
            return f"optimizer {name!r}: {reason}"
    known = f"Known are the names of transformers' optim: {', '.join(STATES)}."
    return f"unknown optimizer {name!r}.{hint(name, STATES)} {known}"


def needs_full_weights(name: str) -> bool:
    """Whether an optimizer works on full weights, which an adapter leaves frozen."""
    return name not in STATES and name.startswith(tuple(_ON_FULL_WEIGHTS))


# ---- formulas -------------------------------------------------------------------------------------------------------


def _like(copies: int, shape: torch.Size, size: int, _: Arguments) -> int:
    """As many tensors of the parameter's own type (torch's optimizers, schedule-free)."""
    return copies * prod(shape) * size


def _whole(copies: int, shape: torch.Size, _size: int, _: Arguments) -> int:
    """bitsandbytes with 32 bits: float32 whatever the parameter is."""
    return copies * prod(shape) * 4


def _eight_bit(copies: int, shape: torch.Size, _size: int, _: Arguments) -> int:
    """bitsandbytes with 8 bits: a byte per number, and a float32 for each block of 256."""
    count = prod(shape)
    if count < SMALLEST_QUANTIZED:
        return copies * count * 4
    return copies * (count + 4 * -(-count // BLOCK))


def _torchao(bits: int, shape: torch.Size, size: int, given: Arguments) -> int:
    """torchao: codes, a float32 per block and a table of 2**bits float32, each twice; whole blocks only."""
    count, block = prod(shape), int(given.get("block_size", BLOCK))
    if count < SMALLEST_QUANTIZED or count % block:
        return 2 * count * size
    return 2 * (count * bits // 8 + 4 * (count // block) + 4 * 2**bits)


def _adafactor(shape: torch.Size, _size: int, _: Arguments) -> int:
    """Row and column means of the squared gradient, in float32 (Shazeer & Stern 2018)."""
    if len(shape) < 2:
        return 4 * prod(shape)
    return 4 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])


def _sgd(shape: torch.Size, size: int, given: Arguments) -> int:
    return _like(int(float(given.get("momentum", 0)) != 0), shape, size, given)


def _rmsprop(shape: torch.Size, size: int, given: Arguments) -> int:
    centered = given.get("centered", "").strip().lower() in ("true", "1", "yes")
    return _like(1 + centered + (float(given.get("momentum", 0)) != 0), shape, size, given)


def _stable_adamw(shape: torch.Size, size: int, given: Arguments) -> int:
    """optimi: Adam's two, and in low precision the compensation of Kahan's sum."""
    return _like(2 + (size < 4), shape, size, given)


STATES: Mapping[str, Formula] = {
    "adamw_torch": partial(_like, 2), "adamw_torch_fused": partial(_like, 2), "adamw_torch_8bit": partial(_torchao, 8),
    "adamw_torch_4bit": partial(_torchao, 4), "adamw_bnb_8bit": partial(_eight_bit, 2), "adamw_8bit": partial(_eight_bit, 2),
    "paged_adamw_8bit": partial(_eight_bit, 2), "paged_adamw_32bit": partial(_whole, 2), "ademamix": partial(_whole, 3),
    "ademamix_8bit": partial(_eight_bit, 3), "paged_ademamix_32bit": partial(_whole, 3),
    "paged_ademamix_8bit": partial(_eight_bit, 3), "lion_32bit": partial(_whole, 1), "lion_8bit": partial(_eight_bit, 1),
    "paged_lion_32bit": partial(_whole, 1), "paged_lion_8bit": partial(_eight_bit, 1), "rmsprop_bnb": partial(_whole, 1),
    "rmsprop_bnb_32bit": partial(_whole, 1), "rmsprop_bnb_8bit": partial(_eight_bit, 1), "adafactor": _adafactor, "sgd": _sgd,
    "rmsprop": _rmsprop, "adagrad": partial(_like, 1), "schedule_free_adamw": partial(_like, 2),
    "schedule_free_radam": partial(_like, 2), "schedule_free_sgd": partial(_like, 1), "stable_adamw": _stable_adamw,
}  # fmt: skip
# tables of 8-bit numbers: signed for a mean, unsigned beside it for a mean of squares
_CODES = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit", "paged_ademamix_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1),
}
_FULL_WEIGHTS = "it works on full weights, which an adapter leaves frozen; the nearest for an adapter is"
_ON_FULL_WEIGHTS = {
    "galore_adafactor": f"{_FULL_WEIGHTS} 'adafactor'",
    "galore_adamw_8bit": f"{_FULL_WEIGHTS} 'adamw_8bit'",
    "galore": f"{_FULL_WEIGHTS} 'adamw_torch'",
    "apollo": f"{_FULL_WEIGHTS} 'adamw_torch'",
    "adalomo": f"{_FULL_WEIGHTS} 'adafactor'",
    "lomo": f"{_FULL_WEIGHTS} 'sgd'",
}
_REFUSED = {
    "grokadamw": "its states wander between CPU and device, so no one number is true; the nearest is 'adamw_torch'",
    "adamw_anyprecision": "its package (torchdistx) is not kept up, so nothing could be checked; the nearest is 'adamw_torch'",
    "adamw_torch_xla": "its states on that device could not be checked; the nearest is 'adamw_torch'",
    "adamw_torch_npu_fused": "its states on that device could not be checked; the nearest is 'adamw_torch_fused'",
}
