"""Short runs of TRL's SFTTrainer on the first layers of the small Llama, and what they did."""

from __future__ import annotations

import json

import torch
from datasets import Dataset
from transformers import TrainerCallback

import layerpeft
from tests.conftest import DATA
from tests.helpers.short import short_llama

BY_GRADIENT = {"by": "gradient_norm", "keep": 3}


def gsm8k_rows():
    """64 rows, cut short."""
    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    found = [json.loads(line) for line in lines]
    return Dataset.from_list([{"prompt": r["question"][-40:], "completion": " " + r["answer"][:40]} for r in found])


class Seen(TrainerCallback):
    """What a run did: the micro-batches of training, and the norms of the gradients that were to be clipped."""

    def __init__(self):
        self.batches, self.norms, self.steps_with_gradient = [], [], []

    def watch(self, trainer):
        def hook(model, args, kwargs):
            if model.training and torch.is_grad_enabled():
                self.batches.append({k: v.clone() if torch.is_tensor(v) else v for k, v in kwargs.items()})

        trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
        trainer.add_callback(self)
        return self

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps_with_gradient.append(set(grads))
        self.norms.append(float(torch.stack([g.norm() for g in grads.values()]).norm()))


def sft(rows, folder, config, model=None, **options):
    from trl import SFTConfig, SFTTrainer

    options = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "use_cpu": True, **options}
    options = {"bf16": False, **options}  # eight times as slow on many CPUs
    args = SFTConfig(str(folder), report_to=[], logging_steps=1, disable_tqdm=True, **options)
    return SFTTrainer(str(short_llama()) if model is None else model, args=args, train_dataset=rows, peft_config=config)


def plain(name):
    return name.replace("base_model.model.", "").replace(".base_layer", "")


def snapshot(model):
    return {plain(n): p.detach().clone() for n, p in model.named_parameters()}


def moved(model, before):
    now = snapshot(model)
    assert set(now) <= set(before)
    return {n for n, p in now.items() if not torch.equal(p, before[n])}


def layer_of(name):
    parts = name.split(".")
    return int(parts[parts.index("layers" if "layers" in parts else "layer") + 1])


def chosen(trainer):
    return [r.layer for r in layerpeft.layer_report(trainer.model).rows if r.chosen]


def record(trainer):
    return trainer.model.peft_config["default"]._layerpeft


class At(TrainerCallback):
    """Does something at one event."""

    def __init__(self, event, action):
        setattr(self, event, lambda *_, **__: action())
