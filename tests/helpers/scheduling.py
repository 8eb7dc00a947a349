"""Runs whose layers change while they train, under a Trainer and in a loop, and all that came of them."""

from __future__ import annotations

import copy

import torch
from transformers import Trainer, TrainingArguments

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.training.follower import followers_of
from tests.helpers.loops import llama

METHODS = {
    "lora": lambda select: LayerLoraConfig(
        select=select, r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
    ),
    "galore": lambda select: LayerGaloreConfig(
        select=select, r=4, target_modules=["q_proj", "v_proj"], update_proj_gap=3, task_type="CAUSAL_LM"
    ),
    "full": lambda select: LayerFullConfig(select=select, task_type="CAUSAL_LM"),
}


def rows(count=64, length=8, seed=0):
    ids = torch.randint(0, 60, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": x, "labels": x} for x in ids]


def wrapped(method="lora", model=None, **select):
    config = METHODS[method](select)
    torch.manual_seed(1)
    return get_peft_model(llama() if model is None else model, config)


def switcher_of(model):
    return followers_of(model)[0].schedule.switcher


def pool_tensors(model):
    """Target -> tensors of the pool, as the follower knows them."""
    return followers_of(model)[0].holdings.tensors()


def trainer_of(model, folder, steps=12, kind=Trainer, **options):
    options = {"save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, **options}
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return kind(model, args, train_dataset=rows())


def found(trainer):
    """All that a run left: weights, optimizer states (those that are away from it included), losses, and where it stands."""
    model = trainer.model
    states = {f"{i}|{k}": v for i, s in trainer.optimizer.state_dict()["state"].items() for k, v in s.items()}
    log = [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"weights": weights, "states": states, "losses": log, "standing": copy.deepcopy(switcher_of(model).plain())}


def loop(model, steps, optimizer=None, accumulate=1, each=lambda step: None, rate=1e-2):
    """A bare loop; `each(step)` runs after every optimizer step, before gradients are dropped."""
    data = rows()
    torch.manual_seed(0)
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for step in range(steps):
        for part in range(accumulate):
            pair = [data[(2 * (step * accumulate + part) + i) % len(data)] for i in (0, 1)]
            ids = torch.stack([r["input_ids"] for r in pair])
            (model(input_ids=ids, labels=ids).loss / accumulate).backward()
        optimizer.step()
        each(step)
        optimizer.zero_grad()
    return optimizer
