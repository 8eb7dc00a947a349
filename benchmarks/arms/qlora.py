"""QLoRA (arXiv 2305.14314) by hand: every linear of every layer in nf4, and plain PEFT over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes
import peft
import torch
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
    """bitsandbytes' linears in the place of the model's, PEFT's wrapping, AdamW."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in LINEARS]
    for name in names:
        old = model.get_submodule(name)
        with torch.device("meta"):
            new = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=old.weight.dtype, quant_type="nf4"
            )
        given = {"compress_statistics": False, "quant_type": "nf4", "module": new}
        packed = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, **given)
        new.weight = packed.to(old.weight.device)
        new.support_avx512bf16_for_cpu = False
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True
    wrapped = peft.get_peft_model(model, config(options, num_layers(model)))
    return Ready(wrapped, adamw(wrapped))
