"""Sampling by score with a floor under every layer, after GRASS (arXiv 2604.07808):

`p_i = (1 - floor) · s_i / Σs + floor / n`, `keep` successive draws without replacement; with no score above zero all
are alike.

GRASS samples by mean gradient norm with "adaptive probabilities"; neither their formula nor code was to be had: this
one is ours. Unlike `sample` it leaves no layer without a chance, so that a score which has gone stale, or
was wrong, is found out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from layerpeft.errors import SelectionError
from layerpeft.selection.draws import successive


@dataclass(frozen=True)
class Options:
    """`floor`: the share of the probability that is spread evenly; 1 is uniform sampling."""

    floor: float = 0.2


def probabilities(scores: Sequence[float], options: Options) -> list[float]:
    """Of the first draw; they add up to 1. Raises: SelectionError for negative scores, or a floor above 1."""
    if options.floor > 1:
        raise SelectionError(
            f"pick: adaptive spreads a share of the probability evenly; floor: {options.floor} is above 1"
        )
    if any(s < 0 for s in scores):
        raise SelectionError(
            "pick: adaptive draws in proportion to score, and some scores are negative; use sigmoid, top or bottom"
        )
    count, total = len(scores), sum(scores)
    if not total:
        return [1 / count] * count
    return [(1 - options.floor) * s / total + options.floor / count for s in scores]


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """`keep` positions (None: all), in the order in which they were drawn. Raises: SelectionError."""
    count = len(scores) if keep is None else keep
    return successive(probabilities(scores, options), count, random.Random(f"layerpeft adaptive {seed}"))
