"""How well criteria tell what layers bring, alone and in sets: rank correlations, and what scores cost."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence import chosen, run, stats
from benchmarks.evidence.found import BySeed, Found
from benchmarks.evidence.stats import Statistic
from layerpeft.recipe.tasks.metrics import spearman


@dataclass(frozen=True)
class Correlated:
    """A criterion in a cell. `alone`, `sets`: the seeds and the correlation of any of them, None where runs lack; seconds of its
    scores, passes through the model, bytes at the peak beyond the model's, None where it has no scores of its own."""

    alone: tuple[Sequence[int], Statistic] | None
    sets: tuple[Sequence[int], Statistic] | None
    seconds: float | None
    passes: int | None
    peak: int | None


def mean(by_seed: BySeed, seeds: Sequence[int]) -> float:
    """Over these seeds, some of them twice."""
    return statistics.fmean(by_seed[s] for s in seeds)


def added(drawn: Mapping[tuple[int, ...], BySeed], seeds: Sequence[int], count: int) -> list[float]:
    """What layers add to sets, by these seeds."""
    return list(stats.effects(list(drawn), [mean(by, seeds) for by in drawn.values()], count))


def correlations(found: Found) -> dict[str, Correlated]:
    """By criterion, products among them."""
    design, name = found.design, found.name
    scores = {s: chosen.taken(design, name, found.lines, s) for s in design.oracle.seeds}
    spent: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in run.scores(design, name):
        if one.kind == "score" and one.key in found.lines:
            spent[one.select["name"]].append(found.lines[one.key])
    seeds, alone = found.alone
    several, drawn = found.drawn
    known: dict[str, Correlated] = {}
    for criterion in (*design.criteria.scores, *design.criteria.products):
        if not any(criterion in names for names in scores.values()):
            continue
        lines = spent.get(criterion, [])
        known[criterion] = Correlated(
            _with(criterion, scores, seeds, lambda s: [mean(alone[i], s) for i in range(found.count)]),
            _with(criterion, scores, several, lambda s: added(drawn, s, found.count)),
            statistics.fmean(line["seconds"] for line in lines) if lines else None,
            lines[0]["passes"] if lines else None,
            next((line["bytes"] for line in lines if "bytes" in line), None),
        )
    return known


def _with(
    criterion: str,
    scores: Mapping[int, Mapping[str, Sequence[float]]],
    seeds: Sequence[int],
    gains: Callable[[Sequence[int]], Sequence[float]],
) -> tuple[Sequence[int], Statistic] | None:
    """The correlation of a criterion's scores, the mean of ranks over seeds, with gains of the same seeds."""
    own = [s for s in seeds if criterion in scores[s]]
    if not own:
        return None
    return own, lambda s: spearman(chosen.together([scores[i][criterion] for i in s]), gains(s))
