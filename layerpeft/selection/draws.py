"""Drawing some of several things by weight, from a generator of one's own."""

import hashlib
import math
import random
from collections.abc import Sequence


def successive(weights: Sequence[float], count: int, generator: random.Random) -> list[int]:
    """`count` positions, one draw after another, each in proportion to the weights still in the urn.

    What weighs nothing is drawn only once nothing else is left, and then each with the same chance.
    """
    urn = {i: w for i, w in enumerate(weights) if w > 0}
    drawn: list[int] = []
    while len(drawn) < count and urn:
        point = generator.random() * sum(urn.values())
        chosen = next(reversed(urn))  # rounding may leave the point just past the last one
        for i, w in urn.items():
            point -= w
            if point < 0:
                chosen = i
                break
        drawn.append(chosen)
        del urn[chosen]
    rest = [i for i, w in enumerate(weights) if not w > 0]
    return drawn + generator.sample(rest, count - len(drawn))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), which overflows for no x."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def seed_of(text: str) -> int:
    """A seed from a text, equal in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def seed_within(seed: int, group: str) -> int:
    """The seed of one of several groups that are drawn from; the only one, which has no name, has the seed itself."""
    return seed_of(f"layerpeft within {group} {seed}") if group else seed


def window_seed(seed: int, window: int) -> int:
    """The seed of one window, equal in every process and in a run that is resumed; window 0 has the seed itself."""
    if not window:
        return seed
    return int.from_bytes(hashlib.sha256(f"layerpeft window {seed} {window}".encode()).digest()[:6], "big")
