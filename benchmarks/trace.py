"""One step on tensors that have shapes and no storage: the counts of a model of any size, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import count
from benchmarks.arm import Arm, Ready
from benchmarks.model import Batch, Model, build
from layerpeft.integrations.tracing import as_traced


def traced(arm: Arm, model: Model, batch: Batch, prepare: Callable[[Ready], Ready]) -> dict[str, int]:
    """The counts of one step of an arm, as `count.counts` gives them."""
    with torch.device("meta"):
        ready = prepare(arm.build(build(model, "meta"), traced=True))
    before = dict(ready.model.named_parameters(remove_duplicate=False))
    with as_traced(ready.model):
        after = dict(ready.model.named_parameters(remove_duplicate=False))
        _move(ready.optimizer, {id(before[name]): after[name] for name in before})
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        inputs = {"input_ids": ids, "labels": ids.clone()}
        count.step(ready, inputs, 0)
        return count.counts(ready, inputs, 1)


def _move(optimizer: torch.optim.Optimizer, moved: dict[int, Any]) -> None:
    """Lets the optimizer hold the traced parameters; its states are made in its first step."""
    for group in optimizer.param_groups:
        group["params"] = [moved[id(p)] for p in group["params"]]
        if "fused" in group:
            group["fused"] = True
