"""Successive sampling without replacement, in proportion to score (OwLore, arXiv 2405.18380)."""

import random
from collections.abc import Sequence

from layerpeft.errors import SelectionError
from layerpeft.selection.draws import successive
from layerpeft.selection.picks import NoOptions as Options


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """`keep` positions, one draw after another, each in proportion to the scores still in the urn; a zero is never drawn.

    Raises: SelectionError for negative scores, or fewer positive scores than `keep`.
    """
    if any(s < 0 for s in scores):
        raise SelectionError(
            "pick: sample draws in proportion to score, and some scores are negative; use top or bottom"
        )
    positive = sum(s > 0 for s in scores)
    count = len(scores) if keep is None else keep
    if positive < count:
        raise SelectionError(f"pick: sample is to draw {count} layers, but only {positive} have a score above zero")
    return successive(scores, count, random.Random(f"layerpeft sample {seed}"))
