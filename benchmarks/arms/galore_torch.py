"""GaLore by the package `galore-torch`: gradients of the blocks' linears are projected, all other weights train as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.arm import Ready
from benchmarks.galore import Projection, forget, optimizer, state_bytes


@dataclass(frozen=True)
class Options(Projection):
    """The package's own words. `rest`: embeddings, norms and head train, too, as in its authors' scripts."""

    rest: bool = True


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """`GaLoreAdamW` over all weights. Raises: Unavailable without the package."""
    model.requires_grad_(True)
    made = optimizer(model, options, rest=options.rest)
    return Ready(model, made, refresh=lambda: forget(made), state=lambda: state_bytes(made, model))
