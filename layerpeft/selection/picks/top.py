"""The `keep` highest scores; ties by index."""

from collections.abc import Sequence

from layerpeft.selection.picks import NoOptions as Options


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """Positions of the `keep` highest scores (None: all)."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
