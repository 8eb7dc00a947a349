"""LISA by hand: random blocks train whole and switch every K steps; embeddings, norm and head always train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.arm import Ready, adamw
from benchmarks.switching import switcher


@dataclass(frozen=True)
class Options:
    """How many blocks at a time, for how many steps; `keep_states` as in `switching.py`."""

    layers: int = 2
    switch_every: int = 20
    seed: int = 0
    keep_states: bool = False


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """AdamW over all weights, most of them frozen at any time."""
    model.requires_grad_(True)
    made = adamw(model)
    switch = switcher(model, made, options.layers, options.switch_every, options.seed, options.keep_states)
    return Ready(model, made, before_step=switch)
