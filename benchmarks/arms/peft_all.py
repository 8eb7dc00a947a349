"""Plain PEFT: LoRA on all layers."""

from __future__ import annotations

from dataclasses import dataclass

import peft
from torch import nn

from benchmarks.arm import Ready, adamw
from benchmarks.model import LINEARS, num_layers


@dataclass(frozen=True)
class Options:
    """The rank, and PEFT's factor."""

    r: int = 8
    lora_alpha: int = 16


def config(options: Options, count: int) -> peft.PeftConfig:
    """The stock config."""
    return peft.LoraConfig(r=options.r, lora_alpha=options.lora_alpha, target_modules=LINEARS, task_type="CAUSAL_LM")


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """PEFT's own wrapping, AdamW."""
    wrapped = peft.get_peft_model(model, config(options, num_layers(model)))
    return Ready(wrapped, adamw(wrapped))
