"""Small models with experts in one 3-D weight, trained by gradient projection."""

from __future__ import annotations

import torch

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.tuners.galore.projection import projections
from tests.helpers.loops import adamw
from tests.helpers.models import MODELS, batch

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
RANK = 4


def build(name="mixtral", how=None, dtype=torch.float32, **options):
    model = MODELS[name](**options).to(dtype).train()
    if how is not None:
        model.set_experts_implementation(how)
    return model


def wrap(model=None, select="last:2", **options):
    options = {"r": RANK, "target_modules": [], "target_parameters": EXPERTS, "task_type": "CAUSAL_LM", **options}
    base = build() if model is None else model
    return layerpeft.get_peft_model(base, LayerGaloreConfig(select=select, **options)).train()


def modules(model):
    return dict(projections(model.base_model.model, "default"))


def batches(number=4, length=16, name="mixtral"):
    return [batch(name, MODELS[name](), length=length, seed=seed) for seed in range(number)]


def run(model, steps, optimizer=None, start=0, data=None, rate=1e-2):
    optimizer = adamw(model, rate) if optimizer is None else optimizer
    data = batches() if data is None else data
    for number in range(start, start + steps):
        model(**data[number % len(data)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
