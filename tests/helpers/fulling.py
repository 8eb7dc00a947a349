"""Small models whose weights themselves train, and what tests ask of them."""

from __future__ import annotations

import copy

import torch

import layerpeft
from layerpeft import LayerFullConfig
from layerpeft.tuners.full.layer import wrappers
from tests.helpers.loops import adamw, llama, make_batches, step

BATCHES = make_batches()
IDS = BATCHES[0]["input_ids"]


def wrap(model=None, select="last:1", adapter_name="default", batches=None, **options):
    options = {"task_type": "CAUSAL_LM", **options}
    base = llama() if model is None else model
    config = LayerFullConfig(select=select, **options)
    return layerpeft.get_peft_model(base, config, adapter_name=adapter_name, batches=batches).train()


def train(model, steps=4, rate=1e-2, optimizer=None, start=0):
    model.train()
    optimizer = adamw(model, rate) if optimizer is None else optimizer
    for number in range(start, start + steps):
        step(model, optimizer, BATCHES[number % 8])
    return model


def by_hand(layers=(3,), steps=4, rate=1e-2, only=lambda name: True, model=None):
    """The same layers of a plain model, trained by a loop of one's own."""
    base = llama() if model is None else model
    inside = tuple(f"model.layers.{i}." for i in layers)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.startswith(inside) and only(name))
    return train(base, steps, rate)


def clean(name):
    return name.replace("base_model.model.", "").replace("modules_to_save.default.", "")


def parameters(model):
    """Parameters by their name in the plain model."""
    return {clean(n): p.detach().clone() for n, p in model.named_parameters()}


def trains(model):
    return {clean(n) for n, p in model.named_parameters() if p.requires_grad}


def logits(model, ids=IDS):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def same(one, other):
    return set(one) == set(other) and all(torch.equal(t, other[n]) for n, t in one.items())


def differ(one, other):
    assert set(one) == set(other)
    return {n for n, t in one.items() if not torch.equal(t, other[n])}


def merged(model):
    return parameters(copy.deepcopy(model).merge_and_unload())


def unloaded(model):
    return parameters(copy.deepcopy(model).unload())


def originals_of(model, adapter):
    """Weights as they were, by name, of all modules that were ever active; while the adapter is switched on."""
    states = [w._layerpeft for w in wrappers(model, adapter)]
    return {f"{s.whole.name}.{n}": t for s in states for n, t in (s.aside or {}).items()}
