"""What a model makes of rows that nothing trains on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.evidence import made
from benchmarks.evidence.design import Source


@torch.no_grad()
def measured(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """The mean loss of rows, and the share of right classes where there are such."""
    model.eval()
    found: dict[str, list[float]] = {"loss": [], "accuracy": []}
    rows = []
    for batch in batches:
        out = model(**batch)
        rows.append(len(batch["input_ids"]))
        found["loss"].append(float(out.loss))
        if batch["labels"].dim() == 1:
            found["accuracy"].append(float((out.logits.argmax(-1) == batch["labels"]).float().mean()))
    model.train()
    return {k: statistics.fmean(v, rows) for k, v in found.items() if v}


@torch.no_grad()
def of_language(source: Source, model: Any, tokenizer: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """The mean loss on text, of the next token or of tokens that are hidden: the same ones every time."""
    draw, losses = torch.Generator().manual_seed(0), []
    model.eval()
    for batch in batches:
        losses.append(float(model(**made.inputs(source, batch["input_ids"], tokenizer, draw)).loss))
    return statistics.fmean(losses)
