"""Plain PEFT: LoRA on some layers, by `layers_to_transform`."""

from __future__ import annotations

from dataclasses import dataclass

import peft
from torch import nn

from benchmarks.arm import Ready, adamw
from benchmarks.model import LINEARS, num_layers
from layerpeft.selection.grammar import layer_numbers


@dataclass(frozen=True)
class Options:
    """Which layers (layerpeft's grammar), the rank, and PEFT's factor."""

    layers: str = "last:3"
    r: int = 8
    lora_alpha: int = 16


def config(options: Options, count: int) -> peft.PeftConfig:
    """The stock config for a model of `count` layers."""
    return peft.LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        target_modules=LINEARS,
        layers_to_transform=list(layer_numbers(options.layers, count)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """PEFT's own wrapping, AdamW."""
    wrapped = peft.get_peft_model(model, config(options, num_layers(model)))
    return Ready(wrapped, adamw(wrapped))
