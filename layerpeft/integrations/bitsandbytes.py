"""What layerpeft has to know of bitsandbytes; the package itself is imported only where a layer is to be quantized by it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

BLOCK = 64  # weights per scale, bitsandbytes' default
BLOCK_NESTED = 256  # scales per scale of scales
INT8_THRESHOLD = 6.0  # inputs above it are multiplied in 16 bit (LLM.int8(), arXiv 2208.07339)


def keep_cpu_layout(model: nn.Module) -> None:
    """Keeps 4-bit weights on a CPU in the layout they were saved in.

    On CPUs with AVX512-BF16 an evaluation forward repacks them for inference; training after that loses gradients silently.
    """
    if "bitsandbytes" not in sys.modules:
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _kinds() -> Any:
    """bitsandbytes' modules and parameters, whose types say less than they take."""
    import bitsandbytes

    return bitsandbytes.nn


def four_bit(linear: nn.Linear, kind: str, double_quant: bool) -> nn.Module:
    """The linear in "nf4" or "fp4" on its own device (arXiv 2305.14314). Raises: ImportError without bitsandbytes."""
    kinds = _kinds()
    weight = linear.weight.data
    with torch.device("meta"):
        new = kinds.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=double_quant,
            quant_type=kind,
        )
    packed = kinds.Params4bit(
        weight, requires_grad=False, compress_statistics=double_quant, quant_type=kind, module=new
    )
    new.weight = packed.to(weight.device)
    new.support_avx512bf16_for_cpu = False
    return _finished(new, linear)


def eight_bit(linear: nn.Linear) -> nn.Module:
    """The linear in int8, a scale per row (arXiv 2208.07339). Raises: ImportError without bitsandbytes."""
    kinds = _kinds()
    weight = linear.weight.data
    with torch.device("meta"):
        new = kinds.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=INT8_THRESHOLD,
        )
    # bitsandbytes quantizes int8 on the way to a device alone, never in place on one
    start = weight if weight.device.type == "meta" else weight.cpu()
    packed = kinds.Int8Params(start, requires_grad=False, has_fp16_weights=False)
    new.weight = packed.to(weight.device)
    return _finished(new, linear)


def _finished(new: nn.Module, linear: nn.Linear) -> nn.Module:
    if linear.bias is not None:
        new.bias = linear.bias  # the parameter itself, with the mark that it was loaded
    new.source_cls = type(linear)  # transformers' mark on what it has put in  # type: ignore[assignment]
    return new.train(linear.training)


def precision_of(module: nn.Module) -> str | None:
    """ "nf4", "fp4" or "int8" as the stored tensors have it; None for what is not bitsandbytes'."""
    if "bitsandbytes" not in sys.modules:
        return None
    kinds = _kinds()
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, kinds.Linear4bit):
        state: Any = getattr(weight, "quant_state", None)
        return None if state is None or weight.dtype.is_floating_point else state.quant_type
    if isinstance(module, kinds.Linear8bitLt):
        return "int8" if weight.dtype == torch.int8 else None
    return None


def reads(kind: str, columns: int, device: torch.device) -> bool:
    """Whether what is packed is read back rightly.

    On a CPU, bitsandbytes 0.50.2 reads 4-bit matrices wrongly whose rows are no whole number of blocks.
    """
    return kind == "int8" or device.type != "cpu" or columns % BLOCK == 0


def is_nested(module: Any) -> bool:
    """Whether the scales of a 4-bit weight are quantized, too."""
    return bool(module.weight.quant_state.nested)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The packed weight with all scales and tables that belong to it."""
    weight: Any = module.weight
    found = [weight.data]
    state = getattr(weight, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        found += [v for v in vars(part).values() if isinstance(v, torch.Tensor)] if part is not None else []
    scales = getattr(weight, "SCB", None)
    return found + ([scales] if isinstance(scales, torch.Tensor) else [])


def kept(module: Any) -> tuple[Any, ...]:
    """What a quantized linear computes with, to be put back after a merge: its weight, and int8's codes and scales in use."""
    state = getattr(module, "state", None)
    return (module.weight, *((state.CB, state.SCB) if state is not None else ()))


def put_back(module: Any, found: tuple[Any, ...]) -> None:
    """Gives a linear what `kept` has taken down."""
    module.weight = found[0]
    if len(found) > 1:
        module.state.CB, module.state.SCB = found[1:]


def packed_bytes(kind: str, rows: int, columns: int, double_quant: bool) -> int:
    """What a matrix takes with its scales and tables."""
    count = rows * columns
    if kind == "int8":
        return count + 4 * rows
    blocks = -(-count // BLOCK)
    if double_quant:
        return -(-count // 2) + blocks + 4 * -(-blocks // BLOCK_NESTED) + 4 * (16 + 256 + 1)
    return -(-count // 2) + 4 * (blocks + 16)
