"""Tables of what has run: markdown, with numbers of runs and 95 % intervals over seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence import chosen, run, stats
from benchmarks.evidence.cell import Cell
from benchmarks.evidence.design import Design
from benchmarks.evidence.stats import Span, interval, said
from benchmarks.evidence.store import Store
from benchmarks.table import markdown
from layerpeft.recipe.tasks.metrics import spearman


@dataclass(frozen=True)
class Found:
    """A cell with its lines."""

    cell: Cell
    lines: Mapping[str, Mapping[str, Any]]

    @property
    def design(self) -> Design:
        return self.cell.design

    @property
    def count(self) -> int:
        return self.design.layers(self.cell.name)

    def gain(self, one: run.Run) -> float | None:
        """How much lower the held-out loss is after a run; None where it has not run."""
        line = self.lines.get(one.key)
        return None if line is None else line["before"]["loss"] - line["after"]["loss"]

    def gains(self, layers: Sequence[int], seeds: Sequence[int]) -> dict[int, float]:
        """By seed, as far as it has run."""
        runs = {seed: chosen.layers_run(self.design, self.cell.name, layers, seed) for seed in seeds}
        return {seed: gain for seed, one in runs.items() if (gain := self.gain(one)) is not None}

    def alone(self) -> tuple[list[int], dict[int, dict[int, float]]]:
        """Seeds of which every layer has run by itself, and gains by layer and seed."""
        found = {i: self.gains([i], self.design.oracle.seeds) for i in range(self.count)}
        return [s for s in self.design.oracle.seeds if all(s in by for by in found.values())], found

    def drawn(self) -> tuple[list[int], dict[tuple[int, ...], dict[int, float]]]:
        """The same of the drawn sets."""
        sets = run.sets(self.design, self.cell.name)
        found = {layers: self.gains(layers, self.design.oracle.seeds) for layers in sets}
        return [s for s in self.design.oracle.seeds if all(s in by for by in found.values())], found


def _cells(design: Design, store: Store, data: Path | None, models: Path) -> Iterator[Found]:
    for name in design.cells:
        lines = store.lines(name)
        if lines:
            yield Found(Cell(design, name, data, models), lines)


def oracle(found: Found) -> list[list[str]]:
    """A line for every layer: what it gains alone, what it adds to a set, and what all layers gain."""
    seeds, alone = found.alone()
    several, drawn = found.drawn()
    rows = []
    for layer in range(found.count):
        own = interval(seeds, lambda s, at=layer: _mean(alone[at], s)) if seeds else None
        added = interval(several, lambda s, at=layer: float(_effects(drawn, s, found.count)[at])) if several else None
        rows.append([found.cell.name, str(layer), own and said(own, 3) or "", added and said(added, 3) or ""])
    every = found.gains(range(found.count), found.design.oracle.seeds)
    if every:
        rows.append([found.cell.name, "all", said(interval(list(every), lambda s: _mean(every, s)), 3), ""])
    return rows


def _mean(by_seed: Mapping[int, float], seeds: Sequence[int]) -> float:
    return statistics.fmean(by_seed[s] for s in seeds)


def _effects(drawn: Mapping[tuple[int, ...], Mapping[int, float]], seeds: Sequence[int], count: int) -> Any:
    return stats.effects(list(drawn), [_mean(by, seeds) for by in drawn.values()], count)


def criteria(found: Found) -> list[list[str]]:
    """A line for every criterion: rank correlation with what layers gain alone and add to sets, and what it costs."""
    return [
        [found.cell.name, name, _or(one.alone), _or(one.sets), f"{one.seconds:.1f}" if one.seconds else "0", one.passes]
        for name, one in _correlations(found).items()
    ]


@dataclass(frozen=True)
class Correlated:
    """A criterion in a cell: rank correlations, seconds of its scores, passes through the model as text."""

    alone: Span | None
    sets: Span | None
    seconds: float
    passes: str


def _correlations(found: Found) -> dict[str, Correlated]:
    design, name = found.design, found.cell.name
    by_seed = {s: chosen.taken(design, name, found.lines, s) for s in design.criteria.seeds}
    seeds, alone = found.alone()
    several, drawn = found.drawn()
    spent: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in run.scores(design, name):
        if one.kind == "score" and one.key in found.lines:
            spent[one.select["name"]].append(found.lines[one.key])
    known: dict[str, Correlated] = {}
    for criterion in (*design.criteria.scores, *design.criteria.products):
        scored = [s for s, names in by_seed.items() if criterion in names]
        if not scored:
            continue

        def with_what(
            gains: Callable[[Sequence[int]], Sequence[float]],
            over: Sequence[int],
            c: str = criterion,
            by: Sequence[int] = tuple(scored),
        ) -> Span | None:
            def statistic(pairs: Sequence[int]) -> float:
                own = [by[i % len(by)] for i in pairs]
                scores = chosen.together([by_seed[s][c] for s in own])
                return spearman(scores, gains([over[i % len(over)] for i in pairs]))

            return interval(range(len(over)), statistic) if over else None

        lines = spent.get(criterion, [])
        known[criterion] = Correlated(
            with_what(lambda s: [_mean(alone[i], s) for i in range(found.count)], seeds),
            with_what(lambda s: list(_effects(drawn, s, found.count)), several),
            statistics.fmean(line["seconds"] for line in lines) if lines else 0.0,
            str(lines[0]["passes"]) if lines else "",
        )
    return known


def _or(span: Span | None) -> str:
    return "" if span is None else said(span)


def regret(found: Found) -> list[list[str]]:
    """A line for every choice: its gain, and how much of what all layers gain it lacks beside the best known set, by budget."""
    gains = _judged(found)
    if ("all", "count") not in gains:
        return []
    whole = statistics.fmean(gains["all", "count"].values())
    _, drawn = found.drawn()
    sets = [statistics.fmean(by.values()) for by in drawn.values() if by]
    rows = []
    for budget in chosen.BUDGETS:
        own = {name: by for (name, b), by in gains.items() if b == budget and by and (name, b) != ("all", "count")}
        if budget in ("steps", "time"):
            own["all"] = gains["all", "count"]
        means = [statistics.fmean(by.values()) for by in own.values()]
        best = max([*means, *(sets if budget == "count" else ())], default=0.0)
        for name, by in sorted(own.items(), key=lambda item: -statistics.fmean(item[1].values())):
            lacks = interval(list(by), lambda s, by=by, best=best: (best - _mean(by, s)) / whole)
            gain = interval(list(by), lambda s, by=by: _mean(by, s))
            rows.append([found.cell.name, budget, name, said(gain, 3), said(lacks, 3), str(len(by))])
    return rows


def _judged(found: Found) -> dict[tuple[str, str], dict[int, float]]:
    """Gains by choice and budget, and seed."""
    gains: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    every = found.gains(range(found.count), found.design.final.seeds)
    if every:
        gains["all", "count"] = every
    for one in chosen.final(found.design, found.cell, found.lines):
        if (gain := found.gain(one.run)) is not None:
            gains[one.name, one.budget][one.run.seed] = gain
    return gains


def methods(found: Found) -> list[list[str]]:
    """A line for every method at its best rate: held-out loss, seconds of a step."""
    best = chosen.best_rates(found.design, found.cell.name, found.lines)
    lines: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for name, method in found.design.methods.items():
        for seed in found.design.final.seeds if name in best else ():
            one = run.of_method(found.design, found.cell.name, method, seed, best[name])
            if one.key in found.lines:
                lines[name][seed] = found.lines[one.key]
    return [
        [
            found.cell.name, name, f"{best[name]:g}",
            said(interval(list(by), lambda s, by=by: statistics.fmean(by[i]["after"]["loss"] for i in s)), 3),
            f"{statistics.fmean(line['seconds'] for line in by.values()):.1f}", str(len(by)),
        ]
        for name, by in lines.items()
    ]  # fmt: skip


def retention(found: Found) -> list[list[str]]:
    """A line for every set that was judged at equal steps: how much the loss on the text of pre-training rose."""
    kept: dict[str, dict[int, float]] = defaultdict(dict)
    layers = {"all": range(found.count), **{f"layer {i}": [i] for i in range(found.count)}}
    keep = found.design.oracle.keep
    layers[f"last {keep}"] = range(found.count - keep, found.count)
    for name, numbers in layers.items():
        for seed in found.design.oracle.seeds:
            line = found.lines.get(chosen.layers_run(found.design, found.cell.name, list(numbers), seed).key)
            if line is not None and line["after"]["retained"] is not None:
                kept[name][seed] = line["after"]["retained"] - line["before"]["retained"]
    return [
        [found.cell.name, name, said(interval(list(by), lambda s, by=by: _mean(by, s)), 3), str(len(by))]
        for name, by in kept.items()
    ]


TABLES: Mapping[str, tuple[Callable[[Found], list[list[str]]], tuple[str, ...]]] = {
    "oracle": (oracle, ("cell", "layer", "gains alone", "adds to a set")),
    "criteria": (criteria, ("cell", "criterion", "alone", "in sets", "seconds", "passes")),
    "regret": (regret, ("cell", "budget", "choice", "gain", "regret, of what all layers gain", "seeds")),
    "methods": (methods, ("cell", "method", "rate", "held-out loss", "seconds", "seeds")),
    "retention": (retention, ("cell", "trained", "loss on the text of pre-training", "seeds")),
}


def table(design: Design, store: Store, name: str, data: Path | None, models: Path, as_json: bool = False) -> str:
    """A table of all cells that have begun, as markdown or as JSON."""
    make, head = TABLES[name]
    rows = [row for found in _cells(design, store, data, models) for row in make(found)]
    return (
        json.dumps([dict(zip(head, row, strict=True)) for row in rows], indent=1) if as_json else markdown(head, rows)
    )
