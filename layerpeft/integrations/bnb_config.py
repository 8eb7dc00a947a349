"""Whether transformers can load a quantized model by itself, and what its config has to say for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BLOCK = 64  # weights per scale, bitsandbytes' default


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
        own = [c for c in taken["_weight_conversions"] if not any(hasattr(o, "hf_quantizer") for o in _operations(c))]
        model._weight_conversions = own
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


def _operations(conversion: Any) -> Any:
    return getattr(conversion, "operations", ())


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
