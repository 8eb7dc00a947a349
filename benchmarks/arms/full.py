"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.arm import Ready, adamw


@dataclass(frozen=True)
class Options:
    """None."""


def config(options: Options, count: int) -> None:
    """No PEFT config."""


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """All weights, AdamW."""
    model.requires_grad_(True)
    return Ready(model, adamw(model))
