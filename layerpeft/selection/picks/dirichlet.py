"""Best layers at first, chance weighted by past choices later on (AdaGradSelect, arXiv 2512.15764).

With probability `eps_t = eps · exp(-eps_decay · window)` the `keep` highest scores; otherwise p ~ Dirichlet(counts +
prior), with `counts` in how many windows each layer was chosen so far, and `keep` successive draws by p without
replacement. There is no published code, and the paper's numbers for eps and its decay could not be had: the defaults
are ours. The paper takes the best in the first epoch alone (`explore`: in so many windows); it counts optimizer steps,
ours windows (`reselect_steps: 1` makes them one). A layer never chosen keeps the chance that `prior` gives it. Ties,
and windows before anything is measured, do not fall to the lowest layers: where all scores are equal, p decides.
"""

import math
import random
from dataclasses import dataclass

from layerpeft.errors import SelectionError
from layerpeft.selection.draws import successive
from layerpeft.selection.picks import Traits
from layerpeft.selection.schedule import Taken, Turn

TRAITS = Traits(again_only=True)


@dataclass(frozen=True)
class Options:
    """`eps`: chance of the greedy choice at window 0; `eps_decay`: how fast it fades; `explore`: windows in which there is one
    (null: all); `prior`: pseudo-count of every layer."""

    eps: float = 1.0
    eps_decay: float = 0.05
    prior: float = 1.0
    explore: int | None = None


def again(turn: Turn, options: Options) -> Taken:
    """The window's choice. Raises: SelectionError for `eps` above 1."""
    if options.eps > 1:
        raise SelectionError(f"pick: dirichlet takes the best with probability eps; eps: {options.eps} is above 1")
    count = len(turn.scores)
    keep = count if turn.keep is None else turn.keep
    generator = random.Random(f"layerpeft dirichlet {turn.seed}")
    greedy = generator.random() < options.eps * math.exp(-options.eps_decay * turn.window)
    greedy = greedy and (options.explore is None or turn.window < options.explore)
    if greedy and len(set(turn.scores)) > 1:
        return Taken(tuple(sorted(range(count), key=lambda i: (-turn.scores[i], i))[:keep]))
    counts = turn.counts or (0,) * count
    # Gamma variates over their sum are a Dirichlet draw; draws in proportion need no division.
    gammas = [generator.gammavariate(c + options.prior, 1.0) for c in counts]
    return Taken(tuple(successive(gammas, keep, generator)))
