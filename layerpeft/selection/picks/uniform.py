"""Every layer with the same chance (LISA, arXiv 2403.17919): `keep` of n, uniformly without replacement.

The paper keeps the embedding, the head and (in its code) the final norm training besides; here those train only if
asked for. Faults of published code that are not shared: layers that were frozen before the optimizer was built get
gradients and are never updated (early LISA, ms-swift until 2026); moments of frozen layers are never released; draws
from numpy's global generator.
"""

import random
from collections.abc import Sequence

from layerpeft.selection.picks import NoOptions as Options
from layerpeft.selection.picks import Traits

TRAITS = Traits(scoreless=True)


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """`keep` positions (None: all) from a generator of their own; the scores only say how many there are."""
    count = len(scores) if keep is None else keep
    return random.Random(f"layerpeft uniform {seed}").sample(range(len(scores)), count)
