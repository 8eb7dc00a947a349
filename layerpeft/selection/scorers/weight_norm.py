"""Norm of a layer's weights, `sqrt(Σ over its targets ‖W‖²)`; no data needed. Higher is larger; `pick: bottom` takes the
smallest.

What IR-Tuning's mode `weight` (arXiv 2510.00268) takes of one projection, and LISA's motivation (arXiv 2403.17919) of whole
layers while they train: a static statistic, beside which the control arms of `compare` are worth their time. Cost: every weight
is read once, in pieces; no copy of a whole one is made.
"""

from dataclasses import dataclass
from typing import Literal

from layerpeft.model.weights import squared_norm
from layerpeft.selection.scorers import OF_HEADS, Traits
from layerpeft.selection.scoring import Measured, Request, per_layer, per_weight

TRAITS = Traits(units=OF_HEADS)


@dataclass(frozen=True)
class Options:
    """`normalize`: `none`, or `numel` (the root mean square of the weights, for layers of different sizes)."""

    normalize: Literal["none", "numel"] = "none"


def needs(options: Options) -> str:
    """The weights alone."""
    return "weights"


def score(request: Request, options: Options) -> Measured:
    """Norms per layer and per target (0 where a layer holds no target)."""
    targets = request.targets
    parts = {t.name: squared_norm(request.model, t) for t in targets}
    by_layer = per_weight if options.normalize == "numel" else per_layer
    squares = by_layer(request.layers, targets, parts)
    if options.normalize == "numel":
        parts = {t.name: parts[t.name] / t.params for t in targets}
    return Measured(tuple(s**0.5 for s in squares), {n: s**0.5 for n, s in parts.items()})
