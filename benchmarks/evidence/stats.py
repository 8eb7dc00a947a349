"""Effects of layers in sets, and intervals by resampling seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

DRAWS = 1000
Span = tuple[float, float, float]  # a mean, and the ends of its 95 % interval


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


def interval(seeds: Sequence[int], statistic: Callable[[Sequence[int]], float]) -> Span:
    """A statistic of all seeds, and where 95 % of it lie when as many seeds are drawn again from them."""
    whole = statistic(seeds)
    if len(seeds) < 2:
        return whole, float("nan"), float("nan")
    draw = np.random.default_rng(0)
    found = [statistic([seeds[i] for i in draw.integers(0, len(seeds), len(seeds))]) for _ in range(DRAWS)]
    low, high = np.quantile(found, [0.025, 0.975])
    return whole, float(low), float(high)


def said(span: Span, digits: int = 2) -> str:
    """A mean with its interval, as far as there is one."""
    mean, low, high = span
    if not np.isfinite(low):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
