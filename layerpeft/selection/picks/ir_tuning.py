"""IR-Tuning's choice as it was published (arXiv 2510.00268), to be compared with `pick: split`; nothing uses it by default.

Sort the scores, cut where `Var(low) + Var(high)` (population variances, unweighted) is least among the cuts at list
indices int(0.35 n) to int(0.65 n), train the high side. While all scores are equal (they start at 1000, see `by:
adapter_gradient`), random numbers from the window's seed take their place.

Faults of it that are kept, since they are the rule: the index slip (`slip: true`), by which one layer of the low class
trains as well; a number of layers that mostly lies at an edge of the window, whatever the scores are (n = 32: 12 to
21); and, with scores of `adapter_gradient`, a choice that freezes itself, since a layer that does not train keeps the
score it had. Not kept: random numbers without a seed, and the look-up of the minimum by its value in the whole list,
where an equal value outside the window wins.
"""

import random
from dataclasses import dataclass

from layerpeft.errors import SelectionError
from layerpeft.selection.picks import Traits
from layerpeft.selection.picks.split import windowed_cut
from layerpeft.selection.schedule import Taken, Turn

TRAITS = Traits(again_only=True, decides=True)


@dataclass(frozen=True)
class Options:
    """`window`: where the cut may lie, as shares of the number of layers; `slip`: the published index slip."""

    window: tuple[float, float] = (0.35, 0.65)
    slip: bool = True


def again(turn: Turn, options: Options) -> Taken:
    """The high class, highest last. Raises: SelectionError for a `keep` of another kind than auto."""
    if turn.keep is not None:
        raise SelectionError(
            f"pick: ir_tuning decides the number itself; write keep: auto instead of keep: {turn.keep}"
        )
    scores = list(turn.scores)
    if len(set(scores)) < 2:
        generator = random.Random(f"layerpeft ir_tuning {turn.seed}")
        scores = [generator.random() for _ in scores]
    order = sorted(range(len(scores)), key=lambda i: scores[i])  # stable: of equals the later one is the higher
    low = windowed_cut([scores[i] for i in order], options.window)
    return Taken(tuple(order[low - 1 if options.slip else low :]))
