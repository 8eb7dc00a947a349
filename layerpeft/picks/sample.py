"""Successive sampling without replacement, in proportion to score (OwLore, arXiv 2405.18380)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from layerpeft.errors import SelectionError


@dataclass(frozen=True)
class Options:
    """No options."""


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """`keep` positions, one draw after another, each in proportion to the scores still in the urn; a zero is never drawn.

    Raises: SelectionError for negative scores, or fewer positive scores than `keep`.
    """
    if any(s < 0 for s in scores):
        raise SelectionError(
            "pick: sample draws in proportion to score, and some scores are negative; use top or bottom"
        )
    urn = {i: s for i, s in enumerate(scores) if s > 0}
    count = len(scores) if keep is None else keep
    if len(urn) < count:
        raise SelectionError(f"pick: sample is to draw {count} layers, but only {len(urn)} have a score above zero")
    generator = random.Random(f"layerpeft sample {seed}")
    drawn: list[int] = []
    while len(drawn) < count:
        point = generator.random() * sum(urn.values())
        chosen = next(reversed(urn))  # rounding may leave the point just past the last one
        for i, s in urn.items():
            point -= s
            if point < 0:
                chosen = i
                break
        drawn.append(chosen)
        del urn[chosen]
    return drawn
