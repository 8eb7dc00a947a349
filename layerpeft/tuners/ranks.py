"""Ranks in proportion to the scores of layers, at the number of parameters that one rank for all would have.

The idea of EVA (arXiv 2410.07170) and AdaLoRA (arXiv 2303.10512), which redistribute a fixed budget of ranks, for any score of
layers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from layerpeft.errors import ConfigError
from layerpeft.model.layers import Target

MOST_SUMS = 1 << 20  # sums of parameters that are told apart


def cost_of(target: Target) -> int:
    """Parameters of one rank: a column of B and a row of A, of every expert."""
    if target.kind == "experts":
        return target.shape[0] * sum(target.shape[1:])
    return target.shape[0] + math.prod(target.shape[1:])


def by_score(scores: Mapping[int, float], targets: Sequence[Target], rank: int, least: int = 1) -> dict[str, int]:
    """Target -> rank; the targets of a layer have that of the layer's score, but for rounding.

    Before rounding the rank is `λ · score`, no less than `least` and no more than the smaller side of the weight, with λ such
    that all have as many parameters together as with `rank` each. Each is rounded down or up, so that their sum comes as near to
    that as it can from below; among the ways that are as near, those with the largest remainders are rounded up. Raises:
    ConfigError for scores that nothing can be in proportion to.
    """
    held = {t.layer: scores[t.layer] for t in targets}
    if min(held.values()) < 0 or not any(held.values()):
        worst = min(held, key=lambda i: held[i])
        why = "are all 0" if not any(held.values()) else f"fall below 0 ({held[worst]:.4g} for layer {worst})"
        raise ConfigError(
            f"ranks: by_score gives ranks in proportion to scores, and these {why}; choose by another scorer"
        )
    costs = [cost_of(t) for t in targets]
    sides = (t.shape[-2:] if t.kind == "experts" else (t.shape[0], math.prod(t.shape[1:])) for t in targets)
    caps = [max(least, min(pair)) for pair in sides]
    budget = rank * sum(costs)
    wanted = _wanted([held[t.layer] for t in targets], costs, least, caps, budget)
    ranks = [math.floor(w + 1e-9) for w in wanted]
    left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
    able = [i for i in range(len(ranks)) if ranks[i] < caps[i]]
    able.sort(key=lambda i: (round(wanted[i] - ranks[i], 9), -i))
    for i in _nearest_sum(able, costs, left):
        ranks[i] += 1
    return {t.name: r for t, r in zip(targets, ranks, strict=True)}


def _wanted(scores: Sequence[float], costs: Sequence[int], least: int, caps: Sequence[int], budget: int) -> list[float]:
    """Ranks before rounding."""
    top = max(scores)
    shares = [s / top for s in scores]

    def at(scale: float) -> list[float]:
        return [min(max(scale * s, least), cap) for s, cap in zip(shares, caps, strict=True)]

    low, high = 0.0, max(caps) / min(s for s in shares if s)
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(r * c for r, c in zip(at(middle), costs, strict=True))
        low, high = (middle, high) if spent <= budget else (low, middle)
    return at(low)


def _nearest_sum(items: Sequence[int], costs: Sequence[int], most: int) -> list[int]:
    """Those of the items whose costs add up to the most that is not above `most`; of several ways, with the last items."""
    unit = math.gcd(*(costs[i] for i in items)) if items else 1
    room = most // unit
    if room <= 0:
        return []
    if room > MOST_SUMS:
        unit, room = -(-most // MOST_SUMS), MOST_SUMS  # rounded up, so that their sum is never above
    sizes = [-(-costs[i] // unit) for i in items]
    reached = [1]  # of the first items: which sums there are, as bits
    for size in sizes:
        reached.append((reached[-1] | reached[-1] << size) & ((1 << room + 1) - 1))
    total, taken = reached[-1].bit_length() - 1, []
    for i in reversed(range(len(items))):
        if total >= sizes[i] and reached[i] >> (total - sizes[i]) & 1:
            taken.append(items[i])
            total -= sizes[i]
    return taken


def patterns(config: Any, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields by which stock PEFT gives these ranks, each with the scale that `lora_alpha / r` is for all.

    With `use_rslora` the scale is meant to follow the rank, so that alpha is one.
    """
    keys = {name: f"^{re.escape(name)}$" for name, rank in ranks.items() if rank != config.r}
    alphas: dict[str, Any] = {}
    if not config.use_rslora:
        scaled = {name: Fraction(config.lora_alpha) * ranks[name] / config.r for name in keys}
        alphas = {keys[n]: a.numerator if a.denominator == 1 else float(a) for n, a in scaled.items()}
    return {"rank_pattern": {key: ranks[name] for name, key in keys.items()}, "alpha_pattern": alphas}
