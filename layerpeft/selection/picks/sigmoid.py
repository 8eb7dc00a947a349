"""Sampling with weights `sigmoid(score)`, successive draws without replacement: the rule of IST (arXiv 2410.11772).

For scores of either sign, such as those of `by: importance`. Scores near 0 make it nearly uniform.
"""

import random
from collections.abc import Sequence

from layerpeft.selection.draws import sigmoid, successive
from layerpeft.selection.picks import NoOptions as Options


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """`keep` positions (None: all), in the order in which they were drawn."""
    count = len(scores) if keep is None else keep
    return successive([sigmoid(s) for s in scores], count, random.Random(f"layerpeft sigmoid {seed}"))
