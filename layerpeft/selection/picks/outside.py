"""The first layers and the last, the middle left alone: LayRA (arXiv 2509.11414), with the split from the scores.

LayRA trains the first 10 and the last 2 layers, and gives no rule for other depths. Here `keep` layers are divided
between both ends so that their scores add up to the most, at least one at either end; at equal sums more of them stand
at the end, which costs less.
"""

from collections.abc import Sequence

from layerpeft.selection.picks import NoOptions as Options


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """`keep` positions (None: all) from both ends; a single one from the end with the higher score."""
    count = len(scores)
    keep = count if keep is None else keep
    ends = range(1, keep) if keep > 1 else range(keep + 1)

    def taken(first: int) -> list[int]:
        return [*range(first), *range(count - keep + first, count)]

    return taken(max(ends, key=lambda first: (sum(scores[i] for i in taken(first)), -first)))
