"""A few steps on real rows: of LoRA on every layer of a small model that is whole or shortened, or of any other model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import layerpeft
from benchmarks.model import LINEARS
from benchmarks.questions import collated


def wrapped(model: Any, r: int, seed: int) -> Any:
    """LoRA on all linears, drawn from the seed."""
    config = layerpeft.LayerLoraConfig(
        select="stride:1", r=r, lora_alpha=2 * r, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return layerpeft.get_peft_model(model, config).train()


def trained(model: Any, train: Sequence[Any], rows: int, steps: int, lr: float, seed: int) -> None:
    """AdamW on rows drawn from the seed; the rate rises over a tenth of the steps and falls in a line to nothing."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * share_of_rate(number, steps)
        drawn = torch.randint(0, len(train), (rows,), generator=draw).tolist()
        model(**collated([train[i] for i in drawn])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def share_of_rate(number: int, steps: int, part: int = 10) -> float:
    """Of the learning rate, in a step: it rises over one part of so many, and falls in a line to nothing."""
    return min(1.0, part * (number + 1) / steps) * (1 - number / steps)


def scored(train: Sequence[Any], rows: int, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """The batches that a choice sees."""
    draw = torch.Generator().manual_seed(1000 + seed)
    drawn = [torch.randint(0, len(train), (rows,), generator=draw).tolist() for _ in range(count)]
    return [collated([train[i] for i in batch]) for batch in drawn]
