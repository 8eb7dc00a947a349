"""The stored tensors of a quantized linear taken apart, as plain tensors and plain data, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors by name, and facts that JSON takes


def parts(module: nn.Module, precision: str) -> Parts:
    """All of a quantized linear but its bias."""
    take = {"int8": _eight_bit_parts, "nf4": _four_bit_parts, "fp4": _four_bit_parts}.get(precision, _hqq_parts)
    return take(module)


def joined(
    linear: nn.Linear,
    precision: str,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    empty: Callable[..., Any],
) -> nn.Module:
    """The quantized linear again, with the bias of `linear`; `empty`: makes HQQ's linear without weights.

    Raises: ImportError without the package.
    """
    make = {"int8": _eight_bit, "nf4": _four_bit, "fp4": _four_bit}.get(precision, partial(_hqq, empty))
    return make(linear, tensors, facts).train(linear.training)


def _four_bit_parts(module: Any) -> Parts:
    state = module.weight.quant_state
    every = state.as_dict(packed=False)
    tensors = {k: v for k, v in every.items() if isinstance(v, torch.Tensor)}
    facts = {k: v for k, v in every.items() if k not in tensors} | {"compute_dtype": _text(module.compute_dtype)}
    return {"weight": module.weight.data, **tensors}, facts


def _four_bit(linear: nn.Linear, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> nn.Module:
    import bitsandbytes as bnb

    stats = {k: v for k, v in {**tensors, **facts}.items() if k not in ("weight", "compute_dtype")}
    nested = "nested_absmax" in stats
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=_dtype(facts["compute_dtype"]),
            compress_statistics=nested,
            quant_type=facts["quant_type"],
        )
    packed: Any = tensors["weight"]
    new.weight = bnb.nn.Params4bit.from_prequantized(packed, stats, device=packed.device, module=new)
    new.support_avx512bf16_for_cpu = False
    new.bias = linear.bias  # type: ignore[assignment]
    new.source_cls = nn.Linear  # type: ignore[assignment]
    return new


def _eight_bit_parts(module: Any) -> Parts:
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # the first forward moves them
    return {"weight": module.weight.data, "SCB": scales}, {"threshold": module.state.threshold}


def _eight_bit(linear: nn.Linear, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> nn.Module:
    import bitsandbytes as bnb

    make: Any = bnb.nn.Int8Params
    with torch.device("meta"):
        new = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=facts["threshold"],
        )
    weight = make(tensors["weight"], requires_grad=False, has_fp16_weights=False)
    weight.CB, weight.SCB = weight.data, tensors["SCB"]
    new.weight = weight
    new.bias = linear.bias  # type: ignore[assignment]
    new.source_cls = nn.Linear  # type: ignore[assignment]
    return new


def _hqq_parts(module: Any) -> Parts:
    tensors = {k: v for k, v in module.meta.items() if isinstance(v, torch.Tensor)}
    facts = {k: _plain(v) for k, v in module.meta.items() if k not in tensors}
    return {"W_q": module.W_q.data, **tensors}, facts


def _hqq(empty: Any, linear: nn.Linear, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> nn.Module:
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


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _text(value)
    return list(value) if isinstance(value, torch.Size) else value


def _text(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(text: str | None) -> Any:
    return None if text is None else getattr(torch, text)
