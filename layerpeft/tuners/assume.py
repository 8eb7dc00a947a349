"""What a config will come to, as far as it can be known without weights and data: the costliest it may mean."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import peft
from torch import nn

from layerpeft.model.layers import layer_map
from layerpeft.selection import choose, scoring
from layerpeft.selection.grammar import how_many
from layerpeft.selection.schedule import schedule_of
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import Select
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.precision import check_schedule


@dataclass(frozen=True)
class Asleep:
    """Layers of a pool, by name, that do not train at the costliest moment; whether optimizers keep their states all the same."""

    layers: tuple[str, ...]
    keeps_states: bool


def fixed(config: peft.PeftConfig, model: nn.Module) -> tuple[peft.PeftConfig, tuple[str, ...]]:
    """A stock config with its layers fixed, for a model that may be without storage, and what was assumed.

    A choice by weights or data is taken at its costliest, the lowest layers. Raises: LayerpeftError.
    """
    notes: tuple[str, ...] = ()
    found: Any = config
    if isinstance(config, LayerLoraConfig):
        select = Select.parse(config.select)
        if config.is_scheduled:
            return _scheduled(config, select, model)
        if not isinstance(select.by, Scores) and scoring.needs(select) != "nothing":
            found, notes = _costliest(config, select, model)
        found = found.settled(model)
    else:
        found = copy.deepcopy(config)
    if hasattr(found, "init_lora_weights"):
        found.init_lora_weights = True  # other ways to start read the weights, and cost nothing later
    return found, notes


def _costliest(config: LayerLoraConfig, select: Select, model: nn.Module) -> tuple[LayerLoraConfig, tuple[str, ...]]:
    layers = layer_map(model, select.stack)
    targets = config.targets_in(model, layers)
    among = choose.candidates(select, layers, targets)
    number = how_many(select.keep, len(among)) or len(among)
    twin = copy.deepcopy(config)
    twin.select = {"layers": among[:number], "stack": layers.stack}
    note = f"which {number} of {len(among)} layers is not known yet: the lowest are assumed, the costliest choice"
    return twin, (note,)


def _scheduled(config: LayerLoraConfig, select: Select, model: nn.Module) -> tuple[peft.PeftConfig, tuple[str, ...]]:
    """The whole pool wrapped, with what sleeps while the lowest layers that may be chosen together train."""
    layers = layer_map(model, select.stack)
    schedule = schedule_of(select, layers, config.targets_in(model, layers))
    check_schedule(config, layers, schedule.pool)
    number = how_many(select.keep, len(schedule.among)) or len(schedule.among)
    awake = set(schedule.pool if schedule.warmup else (*schedule.among[:number], *schedule.always))
    twin = copy.deepcopy(config)
    twin.select = {"layers": list(schedule.pool), "stack": layers.stack}
    found: Any = twin.settled(model)
    sleeping = tuple(layers.layers[i].name for i in schedule.pool if i not in awake)
    found._layerpeft_asleep = Asleep(sleeping, schedule.state == "keep")
    when = "during the warm-up" if schedule.warmup else "at a time, the lowest assumed, the costliest choice"
    notes = [f"{len(awake)} of {len(schedule.pool)} layers train {when}"]
    if sleeping and schedule.state == "offload":
        notes.append("optimizer states of layers that rest are taken to the CPU")
    return found, tuple(notes)
