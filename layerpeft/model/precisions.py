"""The table of precisions that a linear can be stored in: one row each, and what it takes."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import unknown
from layerpeft.integrations import bitsandbytes, hqq
from layerpeft.integrations.bitsandbytes import _eight_bit, _eight_bit_parts, _four_bit, _four_bit_parts
from layerpeft.integrations.hqq import _hqq, _hqq_parts
from layerpeft.integrations.peft import dequantized
from layerpeft.integrations.torch import Parts

KEPT = "16bit"  # as the model is loaded: bf16, fp16, or float32


@dataclass(frozen=True)
class Precision:
    """A way to store a matrix: nominal bits per weight, and the package that makes it (None: nothing is done)."""

    name: str
    bits: int
    package: str | None


PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("hqq1", 1, "hqq"),
        Precision("hqq2", 2, "hqq"),
        Precision("hqq3", 3, "hqq"),
        Precision("hqq4", 4, "hqq"),
        Precision("fp4", 4, "bitsandbytes"),
        Precision("nf4", 4, "bitsandbytes"),
        Precision("int8", 8, "bitsandbytes"),
        Precision(KEPT, 16, None),
    )
}
BY_BITS = {1: "hqq1", 2: "hqq2", 3: "hqq3", 4: "nf4", 8: "int8", 16: KEPT}


@dataclass(frozen=True)
class Storage:
    """`group_size`: weights per scale, for HQQ (bitsandbytes' blocks hold 64); `double_quant`: 4-bit scales are quantized, too."""

    group_size: int = 64
    double_quant: bool = False


PLAIN = Storage()


def named(value: Any) -> str:
    """The precision that a config means: a name, or a number of bits. Raises: ValueError with what is allowed."""
    if isinstance(value, int) and not isinstance(value, bool) and value in BY_BITS:
        return BY_BITS[value]
    if isinstance(value, str) and value in PRECISIONS:
        return value
    if isinstance(value, str):
        raise ValueError(unknown("precision", value, PRECISIONS))
    raise ValueError(
        f"{value!r} is no precision: a name ({', '.join(PRECISIONS)}) or bits ({', '.join(map(str, BY_BITS))})"
    )


def written(wanted: Callable[[Precision], bool]) -> tuple[str | int, ...]:
    """Every way to write the precisions that are wanted: their names, and the bits that stand for one."""
    found = [row.name for row in PRECISIONS.values() if wanted(row)]
    return (*found, *(bits for bits, name in BY_BITS.items() if name in found))


def missing_packages(names: Any) -> list[str]:
    """What has to be installed for these precisions, and is not."""
    wanted = dict.fromkeys(PRECISIONS[n].package for n in names)
    return [p for p in wanted if p is not None and importlib.util.find_spec(p) is None]


def fits(precision: str, rows: int, columns: int, storage: Storage) -> bool:
    """Whether a matrix (rows, columns) can be stored so."""
    row = PRECISIONS[precision]
    return row.package != "hqq" or hqq.fits(row.bits, rows, columns, storage.group_size)


def apart(precision: str, storage: Storage) -> bool:
    """Whether `bitsandbytes.BLOCK` rows of a matrix are rounded as they are in the whole of it: no scale is of more than these."""
    return PRECISIONS[precision].package == "bitsandbytes" and not storage.double_quant


def reads(precision: str, columns: int, device: torch.device) -> bool:
    """Whether the library reads back what it packs there; a defect of one is known."""
    row = PRECISIONS[precision]
    return row.package != "bitsandbytes" or bitsandbytes.reads(row.name, columns, device)


def stored_bytes(precision: str, rows: int, columns: int, storage: Storage, itemsize: int = 2) -> int:
    """Bytes of a matrix (rows, columns) with its scales; `itemsize`: bytes of a number of the model as it is loaded."""
    row = PRECISIONS[precision]
    if row.package == "hqq":
        return hqq.packed_bytes(row.bits, rows, columns, storage.group_size, itemsize)
    if row.package is not None:
        return bitsandbytes.packed_bytes(row.name, rows, columns, storage.double_quant)
    return rows * columns * itemsize


def quantized_linear(linear: nn.Linear, precision: str, storage: Storage) -> nn.Module:
    """The linear stored in this precision, on its device, its bias kept. Raises: ImportError without the package."""
    row = PRECISIONS[precision]
    if row.package == "hqq":
        return hqq.packed(linear, row.bits, storage.group_size)
    if row.package is None:
        return linear
    if row.name == "int8":
        return bitsandbytes.eight_bit(linear)
    return bitsandbytes.four_bit(linear, row.name, storage.double_quant)


def rounded(weight: torch.Tensor, precision: str, storage: Storage) -> torch.Tensor:
    """The matrix (out, in) as it will be computed with in this precision, in its own type and on its own device."""
    if PRECISIONS[precision].package is None:
        return weight.clone()
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if apart(precision, Storage()) and storage.double_quant:  # rows by themselves, and their scales together
        made = bitsandbytes.in_slabs(linear, lambda part: quantized_linear(part, precision, PLAIN), True)
    else:
        made = quantized_linear(linear, precision, storage)
    return dequantized(made).detach().to(weight.dtype)


def precision_of(module: nn.Module) -> str:
    """The precision that a linear's stored tensors really have."""
    return bitsandbytes.precision_of(module) or hqq.precision_of(module) or KEPT


def packed_otherwise(module: nn.Module, storage: Storage) -> str | None:
    """How a quantized linear is packed, where that is not as `storage` says."""
    found = PRECISIONS[precision_of(module)]
    held: Any = module
    if found.package == "hqq" and (size := held.meta["group_size"]) != storage.group_size:
        return f"in groups of {size}, and asked for in groups of {storage.group_size}"
    if found.name in ("nf4", "fp4") and (nested := bool(held.weight.quant_state.nested)) != storage.double_quant:
        return f"with double_quant={nested}, and asked for with double_quant={storage.double_quant}"
    return None


def shown(module: nn.Module) -> str:
    """The same for people: what is kept is named by its type (bf16, fp16, fp32)."""
    found = precision_of(module)
    weight = getattr(module, "weight", None)
    if found != KEPT or weight is None:
        return found
    return SHORT.get(weight.dtype, str(weight.dtype).removeprefix("torch."))


SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def measured_bytes(module: nn.Module) -> int:
    """Bytes that a linear's weight takes in memory, scales and tables included, its bias not."""
    found = precision_of(module)
    package = PRECISIONS[found].package
    if package is None:
        return module.weight.nbytes  # type: ignore[return-value,operator]
    tensors = hqq.tensors_of(module) if package == "hqq" else bitsandbytes.tensors_of(module)
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, with the scales and tables of those that are quantized."""
    seen: set[int] = set()
    total = sum(held_bytes(t, seen) for t in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if hasattr(module, "in_features") and (package := PRECISIONS[precision_of(module)].package) is not None:
            tensors = hqq.tensors_of(module) if package == "hqq" else bitsandbytes.tensors_of(module)
            total += sum(held_bytes(t, seen) for t in tensors)
    return total


def held_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of a tensor's storage that is not in `seen` yet; 0 for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return 0
    packed = [getattr(value, name) for name in ("codes", "scale", "qmap") if hasattr(value, name)]  # torchao's
    if packed:
        return sum(held_bytes(part, seen) for part in packed)
    storage = value.untyped_storage()
    if storage._cdata in seen:
        return 0
    seen.add(storage._cdata)
    return storage.nbytes()


# ---- the stored tensors of a quantized linear taken apart, as plain tensors and plain data, and put together again


def parts(module: nn.Module, precision: str) -> Parts:
    """All of a quantized linear but its bias."""
    take = {"int8": _eight_bit_parts, "nf4": _four_bit_parts, "fp4": _four_bit_parts}.get(precision, _hqq_parts)
    return take(module)


def joined(
    linear: nn.Linear, tensors: Mapping[str, torch.Tensor], *, precision: str, facts: Mapping[str, Any]
) -> nn.Module:
    """The quantized linear again, with the bias of `linear`. Raises: ImportError without the package."""
    make = {"int8": _eight_bit, "nf4": _four_bit, "fp4": _four_bit}.get(precision, _hqq)
    return make(linear, tensors, facts).train(linear.training)
