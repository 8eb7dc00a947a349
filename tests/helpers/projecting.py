"""Small models that are trained by gradient projection, and what tests ask of them."""

from __future__ import annotations

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.tuners.galore.projection import projections, state_of, tensors
from tests.helpers.loops import adamw, llama, make_batches, step

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BATCHES = make_batches()
IDS = BATCHES[0]["input_ids"]
RANK, GAP, STEPS = 4, 3, 8
STATE = "layerpeft_state.safetensors"


def wrap(model=None, select=(1, 3), adapter_name="default", **options):
    options = {"r": RANK, "update_proj_gap": GAP, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    cast = {"autocast_adapter_dtype": options.pop("autocast_adapter_dtype", True)}
    base = llama() if model is None else model
    config = LayerGaloreConfig(select=list(select), **options)
    return layerpeft.get_peft_model(base, config, adapter_name=adapter_name, **cast).train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, steps=STEPS, rate=1e-2, optimizer=None, start=0):
    model.train()
    optimizer = adamw(model, rate) if optimizer is None else optimizer
    for number in range(start, start + steps):
        step(model, optimizer, BATCHES[number % 8])
    return model


def modules(model, adapter="default"):
    return dict(projections(model.base_model.model, adapter))


def refreshes(model):
    return [
        (state_of(layer).refreshes, state_of(layer).failed, state_of(layer).steps) for layer in modules(model).values()
    ]


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def weights(model):
    """The weights that a run has come to, with everything merged."""
    return parameters(copy.deepcopy(model).merge_and_unload())


def same(one, other):
    return set(one) == set(other) and all(torch.equal(t, other[n]) for n, t in one.items())


def apart(one, other):
    """The largest difference between two runs from the same start."""
    assert set(one) == set(other)
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def close(one, other, most=1e-4):
    return float((one - other).abs().max()) <= most


def snapshot(model):
    """All that a run goes on from."""
    found = {f"{n}|{k}": t.clone() for n, layer in modules(model).items() for k, t in tensors(layer).items()}
    flags = {f"{n}|trains": torch.tensor(p.requires_grad) for n, p in model.named_parameters()}
    return found | flags | parameters(model)


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64}
    quiet = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet)).train()


def gradients(model, batch=BATCHES[2]):
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
