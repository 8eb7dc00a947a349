"""Loops of one's own around a tiny Llama."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import layerpeft
from layerpeft import LayerLoraConfig

BY_GRADIENT = {"by": "gradient_norm", "keep": 2}
BY_OUTLIERS = {"by": "outliers", "keep": 2, "M": 2.0}
LAYERS = 4


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 64, "num_hidden_layers": LAYERS, **options}
    return LlamaForCausalLM(LlamaConfig(**sizes)).train()


def make_batches():
    draw = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 64, (2, 12), generator=draw) for _ in range(8)]
    return [{"input_ids": x, "labels": x} for x in ids]


def wrap(select=BY_GRADIENT, model=None, **options):
    base = llama() if model is None else model
    return layerpeft.get_peft_model(
        base, LayerLoraConfig(select=select, **{"r": 4, "task_type": "CAUSAL_LM", **options})
    )


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, **options)


def step(model, optimizer, *batches, drop=True):
    for batch in batches:
        model(**batch).loss.backward()
    optimizer.step()
    if drop:
        optimizer.zero_grad()


def trained(model, config, steps=3, batches=None):
    """Wrapped, and trained for a few steps."""
    model = layerpeft.get_peft_model(model, config, batches=batches)
    optimizer = adamw(model.train())
    for batch in make_batches()[:steps]:
        step(model, optimizer, batch)
    layerpeft.check_trained(model)
    return model


def record(model):
    return model.peft_config["default"]._layerpeft


def chosen(model):
    selection = record(model).selection
    return None if selection is None else selection.layers


def loras(model):
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def layers_of(names):
    return {int(n.split(".layers.")[1].split(".")[0]) for n in names}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, k)) for m in model.modules() for k in kinds)
