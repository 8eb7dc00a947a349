"""What layerpeft has to know of HQQ (half-quadratic quantization, mobiusml.github.io/hqq_blog), which packs 1 to 4 bits.

Chosen on evidence: below 4 bits and off a GPU it stores what it promises (2.5 bits a weight for 2 bits in groups of 64, scales
included), where torchao 0.18 keeps such weights in int8 (8.4 bits a weight); and PEFT knows its layers.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any

import torch
from torch import nn

WEIGHT = "W_q"  # the name of a packed weight
PER_WORD = {1: 8, 2: 4, 3: 10, 4: 2}  # weights in one stored number
WORD_BYTES = {1: 1, 2: 1, 3: 4, 4: 1}
WHOLE = (1, 2, 4)  # bits for which the number of groups has to fill the stored numbers


@cache
def linear_class() -> Any:
    """HQQ's linear, with scales that follow the model from device to device. Raises: ImportError without hqq."""
    from hqq.core.quantize import HQQLinear

    class PackedLinear(HQQLinear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            """Scales, zeros and bias are plain attributes in HQQ: `model.to(device)` would leave them behind."""
            super()._apply(fn, recurse)
            if self.W_q is None or self.W_q.device.type == "meta":
                return self
            device = self.W_q.device
            self.meta = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.meta.items()}  # type: ignore[union-attr]
            self.bias = self.bias.to(device) if self.bias is not None else None
            self.device = device
            return self

    return PackedLinear


def packed(linear: nn.Linear, bits: int, group_size: int) -> nn.Module:
    """The linear in that many bits, a scale and a zero for each group of weights, on its own device.

    Raises: ImportError without hqq.
    """
    from hqq.core.quantize import BaseQuantizeConfig

    weight = linear.weight.data
    new = empty(bits, group_size, weight.dtype, weight.device)
    asked = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    new.quantize(weight, **{k: v for k, v in asked.items() if k != "offload_meta"})
    new.bias = None if linear.bias is None else linear.bias.data.clone()
    new.W_q.requires_grad_(False)
    return new.train(linear.training)


def empty(bits: int, group_size: int, dtype: torch.dtype, device: Any) -> Any:
    """A layer without weights, to be filled by `load_state_dict`."""
    from hqq.core.quantize import BaseQuantizeConfig

    asked = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    return linear_class()(None, asked, compute_dtype=dtype, device=str(device))


def precision_of(module: nn.Module) -> str | None:
    """ "hqq1" … "hqq4" as the stored tensors have it; None for what is not HQQ's."""
    if "hqq" not in sys.modules:
        return None
    from hqq.core.quantize import HQQLinear

    if not isinstance(module, HQQLinear) or module.meta is None or module.W_q is None:
        return None
    bits: Any = module.meta["nbits"]
    sizes: Any = module.meta["shape"]
    per_word = sizes[0] * sizes[1] / module.W_q.numel()
    return f"hqq{bits}" if math.floor(per_word) in (PER_WORD[bits], PER_WORD[bits] - 1) else None


def is_packed(module: nn.Module) -> bool:
    """Whether HQQ has packed it."""
    return WEIGHT in module._parameters


def tensors_of(module: Any) -> list[torch.Tensor]:
    """The packed weight with its scales and zeros."""
    return [module.W_q.data, *(v for v in module.meta.values() if isinstance(v, torch.Tensor))]


def packed_bytes(bits: int, rows: int, columns: int, group_size: int, itemsize: int) -> int:
    """What a matrix takes with its scales and zeros, which have the type of the model."""
    groups = rows * columns // group_size
    words = -(-groups // PER_WORD[bits]) * group_size
    return words * WORD_BYTES[bits] + 2 * groups * itemsize


def fits(bits: int, rows: int, columns: int, group_size: int) -> bool:
    """Whether HQQ can pack a matrix of this shape."""
    whole = group_size * (PER_WORD[bits] if bits in WHOLE else 1)
    return rows * columns % whole == 0
