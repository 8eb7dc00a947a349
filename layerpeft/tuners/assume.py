"""What a config will come to, as far as it can be known without weights and data: the costliest it may mean."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
from torch import nn

from layerpeft.model.layers import Stacks
from layerpeft.selection import choose, scoring
from layerpeft.selection.budget import best_within
from layerpeft.selection.examined import Examined
from layerpeft.selection.schedule import schedule_of
from layerpeft.selection.select import Select
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.precision import check_schedule


@dataclass(frozen=True)
class Fixed:
    """A stock config with its layers fixed, and what was assumed.

    `asleep`: names of layers of a pool that rest at the costliest moment; `keeps_states`: optimizers keep the states of those.
    """

    config: Any
    assumed: tuple[str, ...] = ()
    asleep: tuple[str, ...] = ()
    keeps_states: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that train, of a config that chooses them."""
        return self.config._layerpeft.selection.names


def fixed(config: peft.PeftConfig, model: nn.Module, stacks: Stacks | None = None) -> Fixed:
    """What a config comes to on a model that may be without storage.

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
    return Fixed(found, notes)


def _costliest(examined: Examined) -> tuple[Examined, tuple[str, ...]]:
    among = choose.candidates(examined.select, examined.layers, examined.targets)
    if examined.select.budget is not None:
        assert examined.costs is not None
        room = examined.select.budget.room(examined.costs)
        held = best_within([1.0] * len(among), among, examined.costs, room)
        return _by_place(examined, held), ("which layers is not known yet: as many as the budget holds are assumed",)
    found = choose.lowest(examined.select, examined.layers, among)
    of = f"{len(found)} of {len(among)} {examined.layers.unit}s"
    note = f"which {of} is not known yet: the lowest are assumed, the costliest choice"
    return _by_place(examined, found), (note,)


def _by_place(examined: Examined, layers: Sequence[int]) -> Examined:
    return replace(examined, select=Select(layers=list(layers), stack=examined.layers.stack, unit=examined.select.unit))


def _scheduled(config: LayerLoraConfig, examined: Examined, model: nn.Module) -> Fixed:
    """The whole pool wrapped, with what sleeps while the lowest layers that may be chosen together train."""
    select, layers = examined.select, examined.layers
    schedule = schedule_of(select, layers, examined.targets)
    check_schedule(config, layers, schedule.pool)
    costliest = choose.lowest(select, layers, schedule.among)
    awake = set(schedule.pool if schedule.warmup else (*costliest, *schedule.always))
    found: Any = config.settled(model, examined=_by_place(examined, schedule.pool))
    sleeping = tuple(layers.names[i] for i in schedule.pool if i not in awake)
    when = "in the end" if choose.joins(select) else "at a time, the lowest assumed, the costliest choice"
    when = "during the warm-up" if schedule.warmup else when
    notes = [f"{len(awake)} of {len(schedule.pool)} {layers.unit}s train {when}"]
    if sleeping and schedule.state == "offload":
        notes.append(f"optimizer states of {layers.unit}s that rest are taken to the CPU")
    return Fixed(found, tuple(notes), sleeping, schedule.state == "keep")
