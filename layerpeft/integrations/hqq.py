"""What layerpeft has to know of HQQ (half-quadratic quantization, mobiusml.github.io/hqq_blog), which packs 1 to 4 bits.

Chosen on evidence: below 4 bits and off a GPU it stores what it promises (2.5 bits a weight for 2 bits in groups of 64, scales
included), where torchao 0.18 keeps such weights in int8 (8.4 bits a weight); and PEFT knows its layers.
"""

import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.torch import Parts, _dtype, _plain

WEIGHT = "W_q"  # the name of a packed weight
SLAB = 1 << 19  # weights optimized at a time
PER_WORD = {1: 8, 2: 4, 3: 10, 4: 2}  # weights in one stored number
WORD_BYTES = {1: 1, 2: 1, 3: 4, 4: 1}
WHOLE = (1, 2, 4)  # bits for which the number of groups has to fill the stored numbers


@cache
def linear_class() -> Any:
    """HQQ's linear, with scales that follow the model from device to device. Raises: ImportError without hqq."""
    from hqq.core.quantize import HQQLinear

    class PackedLinear(HQQLinear):
        def forward_pytorch_backprop(self, x: torch.Tensor) -> torch.Tensor:
            """In the type that the scales have: HQQ multiplies as it is given, which mixed precision turns into two types."""
            with torch.autocast(x.device.type, enabled=False):
                return super().forward_pytorch_backprop(x.to(self.compute_dtype)).to(x.dtype)

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


@torch.no_grad()
def packed(linear: nn.Linear, bits: int, group_size: int) -> nn.Module:
    """The linear in that many bits, a scale and a zero for each group of weights, on its own device.

    Groups are optimized in slabs, since HQQ's float32 copies of a whole matrix take some eighteen times its 16 bits.
    Raises: ImportError without hqq.
    """
    from hqq.core.quantize import Quantizer

    weight = linear.weight.data
    new = empty(bits, group_size, weight.dtype, weight.device)
    groups = weight.reshape(-1, group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    found: dict[str, list[torch.Tensor]] = {"scale": [], "zero": []}
    meta: dict[str, Any] = {}
    asked = new.quant_config["weight_quant_params"]
    step = max(1, SLAB // group_size)
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        numbers, meta = Quantizer.quantize(
            part, device=new.device, compute_dtype=weight.dtype, **{**asked, "bitpack": False}
        )
        codes[start : start + step] = numbers
        for name, values in found.items():
            values.append(meta[name])
    packing = Quantizer.bit_to_packing[bits]
    new.meta = meta | {name: torch.cat(values) for name, values in found.items()}
    new.meta |= {"shape": weight.shape, "packing": packing, "quant_scale": False, "quant_zero": False}
    new.meta["unpack_view_dtype"] = Quantizer.unpack_view_dtype[packing]
    new.W_q = Quantizer.pack[packing](codes)
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.cuda(new.device)  # wherever that is: it makes a parameter of the codes, and scales of the model's type
    new.ready = True
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
    meta: Any = module.meta
    bits, (out, inner), size = meta["nbits"], meta["shape"], meta["group_size"]
    words = -(-(out * inner // size) // PER_WORD[bits]) * size
    return f"hqq{bits}" if module.W_q.numel() == words else None


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


def _hqq_parts(module: Any) -> Parts:
    tensors = {k: v for k, v in module.meta.items() if isinstance(v, torch.Tensor)}
    facts = {k: _plain(v) for k, v in module.meta.items() if k not in tensors}
    return {"W_q": module.W_q.data, **tensors}, facts


def _hqq(linear: nn.Linear, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> nn.Module:
    dtype, packed = _dtype(facts["compute_dtype"]), tensors["W_q"]
    new = empty(facts["nbits"], facts["group_size"], dtype, packed.device)
    new.W_q = nn.Parameter(packed, requires_grad=False)
    new.meta = {
        **{k: v for k, v in tensors.items() if k != "W_q"},
        **facts,
        "shape": torch.Size(facts["shape"]),
        "compute_dtype": dtype,
        "unpack_view_dtype": _dtype(facts["unpack_view_dtype"]),
    }
    new.bias = None if linear.bias is None else linear.bias.data
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.ready = new.in_gpu = True  # in its words: usable
    return new
