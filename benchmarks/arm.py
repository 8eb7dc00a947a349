"""An arm: one way of training, one file of `arms/` whose `build` takes a model and gives it back ready to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.case import read
from layerpeft.errors import LayerpeftError, Problems, unknown
from layerpeft.selection import plugins

ARMS = "benchmarks.arms"


class Unavailable(LayerpeftError):
    """An arm that needs a package which is not installed."""


def nothing(_step: int) -> None:
    """Called before a step by arms that change nothing between steps."""


@dataclass(frozen=True)
class Ready:
    """A model with its optimizer. `before_step` gets the number of the optimizer step.

    `refresh`: makes what a method does now and then, all in one step (new projections), fall due in the next step. `state`: bytes
    of what a method of projection holds now, by part. `folds`: how often every projected weight has been written by now, at least.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    before_step: Callable[[int], None] = nothing
    refresh: Callable[[], None] | None = None
    state: Callable[[], dict[str, int]] | None = None
    folds: Callable[[], int] | None = None


@dataclass(frozen=True)
class Arm:
    """An arm of a case: the label it has there, its file, and its options."""

    label: str
    module: ModuleType = field(repr=False)
    options: Any

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.module.__name__.rpartition(".")[2]

    @property
    def about(self) -> str:
        """What it is, in one line."""
        return str(self.module.__doc__).strip().splitlines()[0]

    def build(self, model: nn.Module, traced: bool = False) -> Ready:
        """The model ready to step. `traced`: its tensors have no values, so that nothing may look at them."""
        return self.module.build(model, self.options, traced)

    def to_dict(self) -> dict[str, Any]:
        """Its file, options and description, as plain data."""
        return {"arm": self.name, "options": asdict(self.options), "about": self.about}


def read_arms(given: Mapping[str, Any], problems: Problems) -> list[Arm]:
    """The arms of a case. A label names its arm unless a key `arm` does: `{peft_all: {r: 8}, ours: {arm: layerpeft}}`."""
    found = []
    for label, value in given.items():
        if value is not None and not isinstance(value, dict):
            problems.add(f"arms.{label}: expected a mapping of options, got {value!r}")
            continue
        options = dict(value or {})
        name = options.pop("arm", label)
        if name not in plugins.names(ARMS):
            problems.add(f"arms.{label}: {unknown('arm', name, plugins.names(ARMS))}")
            continue
        module = plugins.get(ARMS, name)
        filled = read(module.Options, options, problems, f"arms.{label}.")
        if filled is not None:
            found.append(Arm(label, module, filled))
    return found


def adamw(model: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    """AdamW as Trainer makes it by default (fused, no weight decay), over what trains."""
    found = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.device.type != "meta" for p in found)  # tensors without storage become traced ones before they step
    return torch.optim.AdamW(found, lr=lr, weight_decay=0.0, fused=fused)
