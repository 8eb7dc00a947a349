"""OwLore by hand: LISA's switching with `galore-torch` on the linears of the active blocks (arXiv 2405.18380)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.arm import Ready
from benchmarks.galore import Projection, optimizer
from benchmarks.switching import switcher


@dataclass(frozen=True)
class Options(Projection):
    """As published: five blocks for 50 steps, rank 256, a new projection every 100 steps.

    OwLore draws blocks in proportion to their outliers, here all are alike: bytes and times do not depend on which are drawn.
    """

    rank: int = 256
    update_proj_gap: int = 100
    layers: int = 5
    switch_every: int = 50
    seed: int = 0
    keep_states: bool = True


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """`GaLoreAdamW` over all weights, most of them frozen at any time. Raises: Unavailable without the package."""
    model.requires_grad_(True)
    made = optimizer(model, options)
    switch = switcher(model, made, options.layers, options.switch_every, options.seed, options.keep_states)
    return Ready(model, made, before_step=switch)
