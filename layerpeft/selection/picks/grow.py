"""Staged unfreezing: `keep` layers at first, `keep` more in every window, and none is frozen again (ULMFiT, arXiv 1801.06146).

The highest scores come first, so with `by: depth` layers join from the output down, as ULMFiT unfreezes them; another
scorer gives another order, and may be measured again before each window. With `most` it stops there.
"""

from dataclasses import dataclass

from layerpeft.errors import Problem, SelectionError
from layerpeft.selection.picks import Traits
from layerpeft.selection.schedule import Taken, Turn

TRAITS = Traits(again_only=True)


@dataclass(frozen=True)
class Options:
    """`most`: how many layers train in the end (null: all)."""

    most: int | None = None


def most(keep: int, count: int, options: Options) -> int:
    """How many layers of `count` will train at one time. Raises: SelectionError where that is less than begin."""
    if options.most is not None and options.most < keep:
        sentence = f"most: {options.most} layers in the end are fewer than the {keep} of keep, which train at first"
        raise SelectionError(Problem(("most",), sentence))
    return min(count, options.most or count)


def again(turn: Turn, options: Options) -> Taken:
    """Those of the window before, and the best of the others."""
    count = len(turn.scores)
    keep = count if turn.keep is None else turn.keep
    number = min(keep * (turn.window + 1), most(keep, count, options))
    held = list(turn.chosen)[:number]
    others = sorted(set(range(count)) - set(held), key=lambda i: (-turn.scores[i], i))
    return Taken(tuple(held + others[: number - len(held)]))
