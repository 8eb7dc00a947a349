"""Effects of layers in sets, and intervals by resampling seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

DRAWS = 1000
Span = tuple[float, float, float]  # a mean, and the ends of its 95 % interval
Statistic = Callable[[Sequence[int]], float]  # of seeds


def effects(sets: Sequence[Sequence[int]], gains: Sequence[float], count: int) -> np.ndarray:
    """What each of `count` layers adds to the gain of a set, by least squares over sets of one size: deviations from the mean
    effect, which is all that such sets tell. The solution of least norm where sets are few."""
    table = np.zeros((len(sets), count))
    for row, layers in zip(table, sets, strict=True):
        row[list(layers)] = 1.0
    table -= table.mean(0)
    target = np.asarray(gains, float) - np.mean(gains)
    return np.linalg.lstsq(table, target, rcond=1e-9)[0]


def pair_effects(pairs: Mapping[tuple[int, int], float], singles: Sequence[float]) -> dict[tuple[int, int], float]:
    """What a pair gains beyond the gains of its two layers alone."""
    return {(i, j): gain - singles[i] - singles[j] for (i, j), gain in pairs.items()}


def foretold(layers: Sequence[int], singles: Sequence[float], pairs: Mapping[tuple[int, int], float]) -> float:
    """The gain of a set by its layers' gains alone and the effects of its pairs."""
    return sum(singles[i] for i in layers) + sum(pairs[pair] for pair in combinations(sorted(layers), 2))


def interval(seeds: Sequence[int], statistic: Statistic) -> Span:
    """A statistic of all seeds, and where 95 % of it lie when as many seeds are drawn again from them."""
    return across([(seeds, statistic)])


def across(parts: Sequence[tuple[Sequence[int], Statistic]]) -> Span:
    """The mean of a statistic over cells, each with seeds of its own, and where 95 % of it lie when the seeds of every cell are
    drawn again. The cells stay: of others it says nothing."""
    whole = float(np.mean([statistic(seeds) for seeds, statistic in parts]))
    if any(len(seeds) < 2 for seeds, _ in parts):
        return whole, float("nan"), float("nan")
    draw = np.random.default_rng(0)
    found = [
        np.mean([statistic([seeds[i] for i in draw.integers(0, len(seeds), len(seeds))]) for seeds, statistic in parts])
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(found, [0.025, 0.975], method="nearest")  # which keeps what is infinite
    return whole, float(low), float(high)


def reached(lengths: Sequence[float], losses: Sequence[float], wanted: float) -> float:
    """The length at which a loss is reached, in straight lines between those that ran; infinite where none reaches it."""
    before: tuple[float, float] | None = None
    for length, loss in zip(lengths, losses, strict=True):
        if loss <= wanted:
            if before is None:
                return length
            return before[0] + (length - before[0]) * (before[1] - wanted) / (before[1] - loss)
        before = length, loss
    return float("inf")


def said(span: Span, digits: int = 2) -> str:
    """A mean with its interval, as far as there is one."""
    mean, low, high = (f"{value:.{digits}f}" if np.isfinite(value) else "never" for value in span)
    return mean if np.isnan(span[1]) else f"{mean} ({low} to {high})"
