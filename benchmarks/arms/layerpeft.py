"""layerpeft: LoRA on some layers, by `select`; the backward pass stops at the lowest of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import layerpeft
from benchmarks.arm import Ready, adamw
from benchmarks.model import LINEARS, num_layers


@dataclass(frozen=True)
class Options:
    """`select` as in `LayerLoraConfig`, the rank, PEFT's factor, and the precision of layers that do not train, `prefix_cache`."""

    select: Any = "last:3"
    r: int = 8
    lora_alpha: int = 16
    quantize_frozen: str | None = None
    prefix_cache: str | None = None


def config(options: Options, count: int) -> layerpeft.LayerLoraConfig:
    """The config."""
    return layerpeft.LayerLoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        target_modules=LINEARS,
        select=options.select,
        quantize_frozen=options.quantize_frozen,
        prefix_cache=options.prefix_cache,
        task_type="CAUSAL_LM",
    )


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """Our wrapping, AdamW. Where tensors have no values the checks that read weights are left out."""
    given = config(options, num_layers(model))
    wrapped = layerpeft.get_peft_model(model, given.resolve(model) if traced else given)
    return Ready(wrapped, adamw(wrapped))
