"""What a config will come to, as far as it can be known without weights and data: the costliest it may mean."""

from __future__ import annotations

import copy
from typing import Any

import peft
from torch import nn

from layerpeft import choose
from layerpeft.configs import LayerLoraConfig, target_names
from layerpeft.layers import layer_map
from layerpeft.scores import Scores
from layerpeft.selection import Select, how_many
from layerpeft.targets import exclusions, match_targets


def fixed(config: peft.PeftConfig, model: nn.Module) -> tuple[peft.PeftConfig, tuple[str, ...]]:
    """A stock config with its layers fixed, for a model that may be without storage, and what was assumed.

    A choice by weights or data is taken at its costliest, the lowest layers. Raises: LayerpeftError.
    """
    notes: tuple[str, ...] = ()
    found: Any = config
    if isinstance(config, LayerLoraConfig):
        select = Select.parse(config.select)
        if not isinstance(select.by, Scores) and choose.needs(select) != "nothing":
            found, notes = _costliest(config, select, model)
        found = found.settled(model)
    else:
        found = copy.deepcopy(config)
    if hasattr(found, "init_lora_weights"):
        found.init_lora_weights = True  # other ways to start read the weights, and cost nothing later
    return found, notes


def _costliest(config: LayerLoraConfig, select: Select, model: nn.Module) -> tuple[LayerLoraConfig, tuple[str, ...]]:
    layers = layer_map(model, select.stack)
    targets = match_targets(
        layers,
        target_names(config, layers),
        exclusions(config.exclude_modules, model, layers),
        config.target_parameters,
    )
    among = choose.candidates(select, layers, targets)
    number = how_many(select.keep, len(among)) or len(among)
    twin = copy.deepcopy(config)
    twin.select = {"layers": among[:number], "stack": layers.stack}
    note = f"which {number} of {len(among)} layers is not known yet: the lowest are assumed, the costliest choice"
    return twin, (note,)
