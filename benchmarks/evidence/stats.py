"""Effects of layers in sets, and intervals by resampling seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

DRAWS = 1000
PENALTIES = tuple(np.geomspace(1e-3, 1e2, 16))
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


def left_out(sets: Sequence[Sequence[int]], count: int, pairs: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Of the gains of sets, what each would be by a ridge regression on all others: a mean for every size, an effect of each of
    `count` layers and, with `pairs`, of every pair. The penalty is the one of PENALTIES by which these errors are the least."""
    sizes = sorted({len(layers) for layers in sets})
    columns = [(i,) for i in range(count)] + (list(combinations(range(count), 2)) if pairs else [])
    means = [[len(layers) == size for size in sizes] for layers in sets]
    held = [[set(column) <= set(layers) for column in columns] for layers in sets]
    table = np.hstack([np.array(means, float), np.array(held, float)])
    paid = np.diag([0.0] * len(sizes) + [1.0] * len(columns))
    hats = [table @ np.linalg.solve(table.T @ table + penalty * paid, table.T) for penalty in PENALTIES]

    def foretold(gains: np.ndarray) -> np.ndarray:
        errors = [(gains - hat @ gains) / (1 - np.diag(hat)) for hat in hats]
        return gains - min(errors, key=lambda error: float(np.square(error).sum()))

    return foretold


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
