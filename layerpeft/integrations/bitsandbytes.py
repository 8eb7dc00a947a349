"""What layerpeft has to know of bitsandbytes; the package itself is imported only where a layer is to be quantized by it."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.torch import Parts, _dtype, _text

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


def find_packing(module: Any) -> None:
    """Makes a 4-bit weight of what came out of a pickle as a plain parameter, with what tells how it is packed."""
    state = (
        getattr(module.weight, "quant_state", None) if type(getattr(module, "weight", None)) is nn.Parameter else None
    )
    if state is not None:
        how = {"quant_state": state, "quant_storage": module.quant_storage, "bnb_quantized": True}
        module.weight = _kinds().Params4bit(module.weight.data, requires_grad=False, module=module, **how)


def _kinds() -> Any:
    """bitsandbytes' modules and parameters, whose types say less than they take."""
    import bitsandbytes

    return bitsandbytes.nn


def four_bit(linear: nn.Linear, kind: str, double_quant: bool) -> nn.Module:
    """The linear in "nf4" or "fp4" on its own device (arXiv 2305.14314). Raises: ImportError without bitsandbytes."""
    weight = linear.weight.data
    how = {"compress_statistics": double_quant, "quant_type": kind}
    new = _empty_four_bit(linear, compute_dtype=weight.dtype, **how)
    new.weight = _kinds().Params4bit(weight, requires_grad=False, module=new, **how).to(weight.device)
    return new


def eight_bit(linear: nn.Linear) -> nn.Module:
    """The linear in int8, a scale per row (arXiv 2208.07339). Raises: ImportError without bitsandbytes."""
    weight = linear.weight.data
    new = _empty(_kinds().Linear8bitLt, linear, has_fp16_weights=False, threshold=INT8_THRESHOLD)
    # bitsandbytes quantizes int8 on the way to a device alone, never in place on one
    start = weight if weight.device.type == "meta" else weight.cpu()
    packed = _kinds().Int8Params(start, requires_grad=False, has_fp16_weights=False)
    new.weight = packed.to(weight.device)
    return new


def _empty_four_bit(linear: nn.Linear, **how: Any) -> Any:
    new = _empty(_kinds().Linear4bit, linear, **how)
    new.support_avx512bf16_for_cpu = False
    return new


def _empty(kind: Any, linear: nn.Linear, **how: Any) -> Any:
    """A module of bitsandbytes' that lacks its weight alone, to stand in the place of the linear."""
    with torch.device("meta"):
        new = kind(linear.in_features, linear.out_features, linear.bias is not None, **how)
    if linear.bias is not None:
        new.bias = linear.bias  # the parameter itself, with the mark that it was loaded
    new.source_cls = type(linear)  # transformers' mark on what it has put in
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

    On a CPU with AVX-512, bitsandbytes 0.50.2 reads 4-bit matrices wrongly whose rows are no whole number of blocks. They are
    refused on every CPU, since what is packed on one is read on another.
    """
    return kind == "int8" or device.type != "cpu" or columns % BLOCK == 0


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


# ---- whether transformers can load a quantized model by itself, and what its config has to say for that


def standard(model: Any, precisions: Mapping[str, str]) -> Any:
    """A BitsAndBytesConfig with which plain transformers makes the same model out of its own layout, or None where it cannot.

    `precisions`: full name -> precision of the quantized linears; every other linear is named in `llm_int8_skip_modules`.
    """
    kinds = set(precisions.values())
    if len(kinds) != 1 or not kinds <= {"nf4", "fp4", "int8"}:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    (kind,) = kinds
    modules = [model.get_submodule(name) for name in precisions]
    skip = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n not in precisions]
    options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_skip_modules": skip}
    if kind == "int8":
        thresholds = {m.state.threshold for m in modules}
        options["llm_int8_threshold"] = next(iter(thresholds))
        alike = len(thresholds) == 1
    else:
        ways = {(m.compute_dtype, m.weight.quant_state.nested, m.weight.quant_state.blocksize) for m in modules}
        compute, nested, block = next(iter(ways))
        alike = len(ways) == 1 and block == BLOCK
        options = {
            "load_in_4bit": True,
            "llm_int8_skip_modules": skip,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": compute,
        }
    settings = BitsAndBytesConfig(**options)
    return settings if alike and _one_type(model, precisions) and _same(model, precisions, settings) else None


@contextmanager
def saving(model: Any, settings: Any) -> Iterator[None]:
    """Inside, `save_pretrained` writes what is there, with these settings in its config, also where transformers quantized it.

    Of a model that it loaded quantized, transformers cannot undo the loading of the quantized tensors, which needs no undoing.
    """
    taken = {key: vars(model).pop(key) for key in ("hf_quantizer", "_weight_conversions") if key in vars(model)}
    if "_weight_conversions" in taken:
        steps = [(c, getattr(c, "operations", ())) for c in taken["_weight_conversions"]]
        model._weight_conversions = [c for c, own in steps if not any(hasattr(o, "hf_quantizer") for o in own)]
    before = vars(model.config).get("quantization_config")
    model.config.quantization_config = settings
    try:
        yield
    finally:
        vars(model).pop("_weight_conversions", None)
        vars(model).update(taken)
        del model.config.quantization_config
        if before is not None:
            model.config.quantization_config = before


def is_repacked(module: nn.Module) -> bool:
    """Whether an evaluation forward has put 4-bit weights into the layout of a CPU's own kernel."""
    return bool(
        vars(getattr(getattr(module, "weight", None), "quant_state", None) or object).get("packing_format_for_cpu")
    )


def _one_type(model: Any, precisions: Mapping[str, str]) -> bool:
    """Whether transformers, which loads all numbers in one type, would load those of this model in theirs."""
    floats = [t for n, t in model.state_dict().items() if t.is_floating_point() and not _is_scale(n, precisions)]
    return {t.dtype for t in floats} == {model.dtype}


def _is_scale(name: str, precisions: Mapping[str, str]) -> bool:
    above, _, leaf = name.rpartition(".")
    return (above in precisions and leaf != "bias") or above.removesuffix(".weight") in precisions


def _same(model: Any, precisions: Mapping[str, str], settings: Any) -> bool:
    """Tries it without weights: patterns that match a name in part, or parts that stay in 32 bit, would make another model."""
    from transformers.quantizers.auto import AutoHfQuantizer

    with torch.device("meta"):
        twin = type(model)(model.config)
    AutoHfQuantizer.from_config(settings, pre_quantized=True).preprocess_model(
        model=twin, dtype=model.dtype, device_map={"": "cpu"}
    )
    return {n for n, m in twin.named_modules() if hasattr(m, "source_cls")} == set(precisions)


def _four_bit_parts(module: Any) -> Parts:
    state = module.weight.quant_state
    every = state.as_dict(packed=False)
    tensors = {k: v for k, v in every.items() if isinstance(v, torch.Tensor)}
    facts = {k: v for k, v in every.items() if k not in tensors} | {"compute_dtype": _text(module.compute_dtype)}
    return {"weight": module.weight.data, **tensors}, facts


def _four_bit(linear: nn.Linear, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> nn.Module:
    stats = {k: v for k, v in {**tensors, **facts}.items() if k not in ("weight", "compute_dtype")}
    how = {"compress_statistics": "nested_absmax" in stats, "quant_type": facts["quant_type"]}
    new = _empty_four_bit(linear, compute_dtype=_dtype(facts["compute_dtype"]), **how)
    packed = tensors["weight"]
    new.weight = _kinds().Params4bit.from_prequantized(packed, stats, device=packed.device, module=new)
    return new


def _eight_bit_parts(module: Any) -> Parts:
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # the first forward moves them
    return {"weight": module.weight.data, "SCB": scales}, {"threshold": module.state.threshold}


def _eight_bit(linear: nn.Linear, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> nn.Module:
    new = _empty(_kinds().Linear8bitLt, linear, has_fp16_weights=False, threshold=facts["threshold"])
    new.weight = _packed_int8(tensors["weight"], tensors["SCB"])
    return new


def _packed_int8(codes: torch.Tensor, scales: torch.Tensor) -> Any:
    weight = _kinds().Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    weight.CB, weight.SCB = weight.data, scales
    return weight


# ---- layers put together from some rows at a time, for quantization takes up to ten times the matrix meanwhile. Blocks of 64
# weights and rows are quantized each by itself, so that nothing changes in the result.

SLAB = 1 << 19  # weights


def in_slabs(linear: nn.Linear, quantize: Callable[[nn.Linear], nn.Module], double_quant: bool) -> nn.Module:
    """The linear as `quantize` makes it; `quantize`: to nf4, fp4 or int8, its scales plain; `double_quant`: of the result."""
    parts = [quantize(part) for part in _slabs(linear)]
    whole: Any = parts[0]
    weights: list[Any] = [part.weight for part in parts]
    if weights[0].dtype == torch.int8:
        weight = _packed_int8(torch.cat([w.data for w in weights]), torch.cat([w.SCB for w in weights]))
    else:
        weight = weights[0]
        weight.data = torch.cat([w.data for w in weights])
        weight.compress_statistics = whole.weight.compress_statistics = double_quant
        state = weight.quant_state
        state.shape = linear.weight.shape
        state.absmax = torch.cat([w.quant_state.absmax for w in weights])
        if double_quant:
            _nest(state)
    whole.weight, whole.out_features = weight, linear.out_features
    whole.bias = linear.bias
    return whole


def _nest(state: Any) -> None:
    """Quantizes the scales, as bitsandbytes does it for a whole matrix."""
    from bitsandbytes.functional import quantize_blockwise

    state.offset = state.absmax.mean()
    state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=BLOCK_NESTED)
    state.nested = True


def _slabs(linear: nn.Linear) -> Iterator[nn.Linear]:
    """Linears of some rows each, without bias, of whole blocks."""
    rows, columns = linear.weight.shape
    step = max(SLAB // columns // BLOCK, 1) * BLOCK
    for start in range(0, rows, step):
        weight = linear.weight.data[start : start + step]
        with torch.device("meta"):
            part = nn.Linear(columns, len(weight), bias=False)
        part.weight = nn.Parameter(weight, requires_grad=False)
        yield part
