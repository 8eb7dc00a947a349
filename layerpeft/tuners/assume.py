"""What a config will come to, as far as it can be known without weights and data: the costliest it may mean."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
from torch import nn

from layerpeft.model.layers import Stacks
from layerpeft.selection import choose, scoring
from layerpeft.selection.examined import Examined
from layerpeft.selection.grammar import how_many
from layerpeft.selection.schedule import schedule_of
from layerpeft.selection.select import Select
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.precision import check_schedule


@dataclass(frozen=True)
class Asleep:
    """Layers of a pool, by name, that do not train at the costliest moment; whether optimizers keep their states all the same."""

    layers: tuple[str, ...]
    keeps_states: bool


def fixed(
    config: peft.PeftConfig, model: nn.Module, stacks: Stacks | None = None
) -> tuple[peft.PeftConfig, tuple[str, ...]]:
    """A stock config with its layers fixed, for a model that may be without storage, and what was assumed.

    A choice by weights or data is taken at its costliest, the lowest layers. `stacks`: what a walk over the model has found.
    Raises: LayerpeftError.
    """
    notes: tuple[str, ...] = ()
    found: Any
    if isinstance(config, LayerLoraConfig):
        if config.is_scheduled:
            return _scheduled(config, config.examine(model, stacks), model)
        examined = None if config.is_plain else config.examine(model, stacks)
        if examined is not None and scoring.needs(examined.select) != "nothing":
            examined, notes = _costliest(examined)
        found = config.settled(model, examined=examined)
    else:
        found = copy.deepcopy(config)
    if hasattr(found, "init_lora_weights"):
        found.init_lora_weights = True  # other ways to start read the weights, and cost nothing later
    return found, notes


def _costliest(examined: Examined) -> tuple[Examined, tuple[str, ...]]:
    among = choose.candidates(examined.select, examined.layers, examined.targets)
    number = how_many(examined.select.keep, len(among)) or len(among)
    note = f"which {number} of {len(among)} layers is not known yet: the lowest are assumed, the costliest choice"
    return _by_place(examined, among[:number]), (note,)


def _by_place(examined: Examined, layers: Sequence[int]) -> Examined:
    return replace(examined, select=Select(layers=list(layers), stack=examined.layers.stack))


def _scheduled(
    config: LayerLoraConfig, examined: Examined, model: nn.Module
) -> tuple[peft.PeftConfig, tuple[str, ...]]:
    """The whole pool wrapped, with what sleeps while the lowest layers that may be chosen together train."""
    select, layers = examined.select, examined.layers
    schedule = schedule_of(select, layers, examined.targets)
    check_schedule(config, layers, schedule.pool)
    number = how_many(select.keep, len(schedule.among)) or len(schedule.among)
    awake = set(schedule.pool if schedule.warmup else (*schedule.among[:number], *schedule.always))
    found: Any = config.settled(model, examined=_by_place(examined, schedule.pool))
    sleeping = tuple(layers.names[i] for i in schedule.pool if i not in awake)
    found._layerpeft_asleep = Asleep(sleeping, schedule.state == "keep")
    when = "during the warm-up" if schedule.warmup else "at a time, the lowest assumed, the costliest choice"
    notes = [f"{len(awake)} of {len(schedule.pool)} layers train {when}"]
    if sleeping and schedule.state == "offload":
        notes.append("optimizer states of layers that rest are taken to the CPU")
    return found, tuple(notes)
