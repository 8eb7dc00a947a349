"""Layers in turn, `keep` at a time, every one once per round (BAdam, NeurIPS 2024).

A round has ceil(n / keep) windows; the last of a round holds what is left, so where `keep` does not divide n it is
smaller. `order`: `permutation` (another one in every round, drawn from the seed and the round alone), `ascending` (from
the input up) or `descending`. Window w is in round w // ceil(n / keep), so nothing has to be remembered and a resumed
run goes on as it would have. Faults of the published code that are not shared: the first block gets one step less than
the others; the checkpoint holds neither block nor permutation, so a resumed run begins anew; wiping states wipes those
of the always-on modules, too.
"""

import random
from dataclasses import dataclass
from typing import Literal

from layerpeft.selection.picks import Traits
from layerpeft.selection.schedule import Taken, Turn

TRAITS = Traits(scoreless=True, again_only=True)


@dataclass(frozen=True)
class Options:
    """`order`: in which the layers take turns."""

    order: Literal["permutation", "ascending", "descending"] = "permutation"


def again(turn: Turn, options: Options) -> Taken:
    """The block of this window."""
    count = len(turn.scores)
    keep = count if turn.keep is None else turn.keep
    number, place = divmod(turn.window, -(-count // keep))
    order = list(range(count))
    if options.order == "descending":
        order.reverse()
    elif options.order == "permutation":
        random.Random(f"layerpeft cycle {turn.base_seed} {number}").shuffle(order)
    return Taken(tuple(order[place * keep : (place + 1) * keep]))
