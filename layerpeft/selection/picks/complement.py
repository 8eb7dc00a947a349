"""Each further layer is judged given those taken: its score, times what is left of it beside them.

Overlaps of layers make a matrix O with ones on its diagonal (`selection/overlaps.py`). What is left of layer j beside a
set S is `1 - O_jS O_SS⁻¹ O_Sj`, the squared distance of what it does from all that S does; greedily the layer with the
most of `score² · left` is taken. That is greedy inference in a determinantal point process with the scores as qualities
and O as similarities (Chen, Zhang and Zhou, arXiv 1709.05135, whose update by one row of a Cholesky factor is used
here). So an early and a late layer can win together, where `top` takes neighbours that do the same.
"""

from collections.abc import Sequence

from layerpeft.errors import SelectionError
from layerpeft.selection.picks import NoOptions as Options
from layerpeft.selection.picks import Traits

TRAITS = Traits(overlaps=True)


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """The same of layers that do nothing alike."""
    return joint(scores, [[float(i == j) for j in range(len(scores))] for i in range(len(scores))], keep, options)


def joint(
    scores: Sequence[float], overlaps: Sequence[Sequence[float]], keep: int | None, options: Options
) -> list[int]:
    """`keep` positions (None: all), in the order in which they were taken; ties by index.

    Raises: SelectionError for negative scores.
    """
    if any(s < 0 for s in scores):
        raise SelectionError("pick: complement weighs scores against overlaps, and some scores are negative; use top")
    count = len(scores)
    left = [float(overlaps[i][i]) for i in range(count)]
    rows: list[list[float]] = [[] for _ in range(count)]  # of the Cholesky factor: a number for each layer taken
    taken: list[int] = []
    for _ in range(count if keep is None else keep):
        best = max((i for i in range(count) if i not in taken), key=lambda i: (scores[i] ** 2 * left[i], scores[i], -i))
        taken.append(best)
        root = max(left[best], 1e-12) ** 0.5
        for i in set(range(count)) - set(taken):
            inner = sum(a * b for a, b in zip(rows[best], rows[i], strict=True))
            part = (overlaps[best][i] - inner) / root
            rows[i].append(part)
            left[i] = max(0.0, left[i] - part**2)
    return taken
