"""Tables of what has run: markdown or JSON, with 95 % intervals over seeds, by cell and over all cells."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import chosen, run, stats
from benchmarks.evidence.correlated import added, correlations, mean
from benchmarks.evidence.design import Design
from benchmarks.evidence.found import BySeed, Found, cells
from benchmarks.evidence.stats import Span, Statistic, across, interval, said
from benchmarks.evidence.store import Store
from benchmarks.table import markdown
from layerpeft.recipe.tasks.metrics import spearman
from layerpeft.text import ranges

Row = list[Any]  # of text, numbers and spans; None where nothing is known
Part = tuple[Sequence[int], Statistic]
OVER = "all "  # how the name of a row over all cells begins


def of(by_seed: BySeed) -> Part:
    """The mean of what is known by seed, as a part of an interval."""
    return list(by_seed), lambda seeds: mean(by_seed, seeds)


def over(found: Sequence[Any]) -> str:
    """The name of all cells that a row is about."""
    return f"{OVER}{len(found)}"


def overall(rows: Sequence[Row]) -> list[Row]:
    """Those over all cells; where there is but one cell, its own."""
    return [row for row in rows if row[0].startswith(OVER)] or [row for row in rows if row[0] == rows[0][0]]


def oracle(founds: Sequence[Found]) -> list[Row]:
    """A line for every layer: what it gains alone, what it adds to a set; what all layers gain, and the last of them."""
    rows = []
    for found in founds:
        (seeds, alone), (several, drawn) = found.alone, found.drawn
        for layer in range(found.count):
            own = interval(*of({s: alone[layer][s] for s in seeds})) if seeds else None
            adds = (
                interval(several, lambda s, at=layer, f=found, d=drawn: added(d, s, f.count)[at]) if several else None
            )
            rows.append([found.name, str(layer), own, adds])
        keep = found.design.oracle.keep
        last = found.gains(range(found.count - keep, found.count), found.design.oracle.seeds)
        for name, by in (("all", found.all_layers), (f"last {keep}", last)):
            if by:
                rows.append([found.name, name, interval(*of(by)), None])
    return rows


def pairs(founds: Sequence[Found]) -> list[Row]:
    """A line for every pair: its gain, and how far that is beyond its layers' own; how well a regression on everything else
    tells the gains of drawn sets, by effects of layers, and with those of pairs."""
    rows = []
    for found in founds:
        (seeds, alone), (shared, gains), (several, drawn) = found.alone, found.pairs, found.drawn
        both = [s for s in shared if s in seeds]
        if not both:
            continue
        for pair, by in sorted(gains.items(), key=lambda item: -mean(item[1], both)):
            beyond = {s: by[s] - alone[pair[0]][s] - alone[pair[1]][s] for s in both}
            own = interval(*of({s: by[s] for s in both}))
            rows.append([found.name, f"{pair[0]}, {pair[1]}", own, interval(*of(beyond))])
        if common := [s for s in both if s in several]:
            for name, with_pairs in (("layers", False), ("layers and pairs", True)):
                span = interval(common, _foretelling(found, with_pairs))
                rows.append([found.name, f"{len(drawn)} sets by {name}: rank correlation", span, None])
    return rows


def _foretelling(found: Found, with_pairs: bool) -> Statistic:
    """How well the gains of drawn sets are told by all others, those of single layers and of pairs among them."""
    by = {**{(i,): gains for i, gains in found.alone[1].items()}, **found.pairs[1], **found.drawn[1]}
    foretold, places = stats.left_out(list(by), found.count, with_pairs), [k in found.drawn[1] for k in by]

    def statistic(seeds: Sequence[int]) -> float:
        gains = np.array([mean(one, seeds) for one in by.values()])
        return spearman(list(foretold(gains)[places]), list(gains[places]))

    return statistic


def criteria(founds: Sequence[Found]) -> list[Row]:
    """A line for every criterion: rank correlation with what layers gain alone and add to sets, and what its scores cost."""
    by_cell = {found.name: correlations(found) for found in founds}
    rows = []
    for cell, known in by_cell.items():
        for name, one in known.items():
            size = None if one.peak is None else round(one.peak / 2**20)
            rows.append([cell, name, _span(one.alone), _span(one.sets), one.seconds, one.passes, size])
    names = {name for known in by_cell.values() for name in known}
    whole = []
    for name in names:
        known = [by[name] for by in by_cell.values() if name in by]
        alone, sets = [one.alone for one in known if one.alone], [one.sets for one in known if one.sets]
        if len(alone) > 1 and len(sets) > 1:
            both = across(alone), across(sets)
            whole.append([over(alone), name, *both, None, None, None])
    return [*rows, *sorted(whole, key=lambda row: -row[2][0] - row[3][0])]


def _span(part: Part | None) -> Span | None:
    return None if part is None else interval(*part)


def regret(founds: Sequence[Found]) -> list[Row]:
    """A line for every choice: its gain, and this and what it lacks of the best known in parts of what all layers gain, by budget;
    over all cells these parts, and what it gains beyond the last layers, as many of them."""
    rows: list[Row] = []
    for budget in chosen.BUDGETS:
        for found in founds:
            names = [n for n, b in found.judged if b == budget and (n, b) != ("all", "count")]
            for name in sorted(names, key=lambda n: statistics.fmean(found.regret(n, budget).values())):
                by = found.regret(name, budget)
                gain, share = (interval(*of(known(name, budget))) for known in (found.gains_of, found.share))
                rows.append([found.name, budget, name, gain, share, interval(*of(by)), None, len(by)])
        rows += _over_cells(founds, budget)
    return rows


def _over_cells(founds: Sequence[Found], budget: str) -> list[Row]:
    judged = [found for found in founds if any(b == budget and n != "all" for n, b in found.judged)]
    shared = set.intersection(*({n for n, b in f.judged if b == budget} for f in judged)) if len(judged) > 1 else set()
    rows = []
    for name in shared - ({"all"} if budget == "count" else set()):
        shares, lacks = (
            [of(by(name, budget)) for by in parts] for parts in ([f.share for f in judged], [f.regret for f in judged])
        )
        beyond = [of(by) for found in judged if (by := _beyond_last(found, name, budget))]
        gained = across(beyond) if len(beyond) == len(judged) else None
        rows.append([over(judged), budget, name, None, across(shares), across(lacks), gained, None])
    return sorted(rows, key=lambda row: row[5][0])


def _beyond_last(found: Found, name: str, budget: str) -> dict[int, float]:
    """What a choice gains beyond the last layers, as many of them, in parts of what all layers gain; seed by seed."""
    last = found.share("depth" if budget == "count" else f"depth, {found.design.oracle.keep}", budget)
    own = found.share(name, budget)
    return {seed: own[seed] - last[seed] for seed in own if seed in last}


def matched(founds: Sequence[Found]) -> list[Row]:
    """A line for every choice: the operations that it needs for the loss of all layers, in parts of those of all layers."""
    rows = []
    for found in founds:
        for name, seeds in _lengths(found).items():
            layers = run_layers(found, name)
            kept, whole = (interval(seeds, _needed(found, name, kept)) for kept in (True, False))
            everyone = found.cell.costs.of(range(found.count))
            later = replace(found.cell.costs, whole=0.0).of(layers) / everyone
            rows.append([found.name, name, ranges(layers), whole, kept, round(later, 2), len(seeds)])
    for name in dict.fromkeys(row[1] for row in rows):
        parts = [(found, by[name]) for found in founds if name in (by := _lengths(found))]
        if len(parts) > 1:
            kept, whole = (across([(s, _needed(f, name, kept)) for f, s in parts]) for kept in (True, False))
            rows.append([over(parts), name, None, whole, kept, None, None])
    return rows


def _lengths(found: Found) -> dict[str, list[int]]:
    """Seeds of which all lengths of a choice have run, and all layers; by choice."""
    by: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for one in found.lengths:
        by[one.name, one.run.seed].append(one.run.key in found.lines)
    done = [pair for pair, there in by.items() if all(there) and all(by.get(("all", pair[1]), [False]))]
    names = dict.fromkeys(name for name, _ in done if name != "all")
    return {name: [seed for n, seed in done if n == name] for name in names}


def run_layers(found: Found, name: str) -> Sequence[int]:
    """The layers of a choice, with its first seed."""
    return next(one.run.select for one in found.lengths if one.name == name)


def curve(found: Found, name: str, kept: bool, seeds: Sequence[int]) -> tuple[list[float], list[float]]:
    """Operations of a choice, in parts of those of all layers, and held-out losses: means over seeds, a point for every length."""
    unit = next(one.whole for one in found.lengths if one.name == "all")
    by: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for one in found.lengths:
        if one.name == name and one.run.seed in seeds:
            taken = (one.kept if kept else one.whole) / unit
            by[one.epochs][one.run.seed] = taken, found.lines[one.run.key]["after"]["loss"]
    points = [[[p[s][at] for s in seeds] for at in (0, 1)] for _, p in sorted(by.items())]
    return [statistics.fmean(p[0]) for p in points], [statistics.fmean(p[1]) for p in points]


def wanted(found: Found, seeds: Sequence[int]) -> float:
    """The held-out loss that counts as that of all layers."""
    gains = {one.run.seed: found.gain(one.run) or 0.0 for one in found.lengths if one.name == "all"}
    return curve(found, "all", False, seeds)[1][0] + found.design.matched.within * mean(gains, seeds)


def _needed(found: Found, name: str, kept: bool) -> Statistic:
    return lambda seeds: stats.reached(*curve(found, name, kept, seeds), wanted(found, seeds))


@dataclass(frozen=True)
class Tried:
    """A method in a cell: its best rate, the steps that equal operations give it, and its runs at equal steps and at those."""

    rate: float
    steps: int | None
    equal: Mapping[int, run.Run]
    longer: Mapping[int, run.Run]


def tried(found: Found) -> dict[str, Tried]:
    """By method, of those whose rates were all tried."""
    best = chosen.best_rates(found.design, found.name, found.lines)
    steps = chosen.equal_steps(found.design, found.name, found.lines, best)

    def runs(name: str, count: int) -> dict[int, run.Run]:
        method, seeds = found.design.methods[name], found.design.final.seeds
        return {s: run.of_method(found.design, found.name, method, s, best[name], count) for s in seeds}

    return {n: Tried(best[n], steps.get(n), runs(n, 0), runs(n, steps.get(n, 0))) for n in best}


def methods(founds: Sequence[Found]) -> list[Row]:
    """A line for every method at its best rate: what it gains at equal steps, and in as many operations as LoRA on all layers."""
    return [
        [found.name, name, f"{one.rate:g}", one.steps, *_gained(found, one.equal), *_gained(found, one.longer)]
        for found in founds
        for name, one in tried(found).items()
    ]


def _gained(found: Found, runs: Mapping[int, run.Run]) -> Row:
    """What runs gain, and how much the loss on the text of pre-training rises."""
    gains = {s: gain for s, one in runs.items() if (gain := found.gain(one)) is not None}
    rises = _rises(found, runs)
    return [interval(*of(by)) if by else None for by in (gains, rises)]


def retention(founds: Sequence[Found]) -> list[Row]:
    """A line for every choice at equal steps: what it gains, and how much the loss on the text of pre-training rises, also in parts
    of the rise with all layers; these over all cells."""
    shares: dict[str, list[Part]] = defaultdict(list)
    rows = []
    for found in founds:
        if (at := found.setting) is None:
            continue
        whole = _rises(found, {s: at.run(range(found.count), s) for s in found.all_layers})
        for name, runs in _kept(found, at):
            if not (rises := _rises(found, runs)):
                continue
            share = None
            if whole and (unit := statistics.fmean(whole.values())) > 0:
                shares[name].append(of({s: rise / unit for s, rise in rises.items()}))
                share = interval(*shares[name][-1])
            rows.append([found.name, name, *_gained(found, runs), share, len(rises)])
    spans = {name: across(parts) for name, parts in shares.items() if len(parts) > 1}
    return rows + [
        [over(shares[name]), name, None, None, span, None]
        for name, span in sorted(spans.items(), key=lambda i: i[1][0])
    ]


def _rises(found: Found, runs: Mapping[int, run.Run]) -> dict[int, float]:
    return {s: rise for s, one in runs.items() if (rise := found.rise(one)) is not None}


def _kept(found: Found, at: run.Setting) -> Iterable[tuple[str, Mapping[int, run.Run]]]:
    """Choices at equal steps: every layer alone, all, halves, what criteria choose."""
    for layer in range(found.count):
        yield f"layer {layer}", {s: at.run([layer], s) for s in found.design.oracle.seeds}
    for name, budget in found.judged:
        if budget == "count" or (budget == "steps" and name not in {n for n, b in found.judged if b == "count"}):
            yield name, {seed: one.run for seed, one in found.judged[name, budget].items()}


TABLES: Mapping[str, tuple[Callable[[Sequence[Found]], list[Row]], tuple[str, ...]]] = {
    "oracle": (oracle, ("cell", "layer", "gains alone", "adds to a set")),
    "pairs": (pairs, ("cell", "pair", "gain", "beyond its layers alone")),
    "criteria": (criteria, ("cell", "criterion", "alone", "in sets", "seconds", "passes", "MiB")),
    "regret": (regret, ("cell", "budget", "choice", "gain", "share", "regret", "beyond last", "seeds")),
    "matched": (matched, ("cell", "choice", "layers", "operations", "with states kept", "a later step", "seeds")),
    "methods": (
        methods,
        ("cell", "method", "rate", "equal steps", "gain", "forgets", "gain at equal operations", "forgets then"),
    ),
    "retention": (retention, ("cell", "trained", "gain", "forgets", "of what all layers forget", "seeds")),
}


def table(design: Design, store: Store, name: str, data: Path | None, models: Path, as_json: bool = False) -> str:
    """A table of all cells that have begun, as markdown or as JSON, where an interval is a list of mean, low and high end."""
    make, head = TABLES[name]
    founds = cells(design, store, data, models)
    if as_json:
        return json.dumps(plain(name, founds), indent=1)
    return markdown(head, [[text_of(value) for value in row] for row in make(founds)])


def plain(name: str, founds: Sequence[Found]) -> list[dict[str, Any]]:
    """A table as JSON knows it: rows by their columns; intervals are lists of mean, low and high end, text where infinite."""
    make, head = TABLES[name]
    return [dict(zip(head, map(_plain, row), strict=True)) for row in make(founds)]


def text_of(value: Any) -> str:
    """A value of a table as a person reads it: an interval, a number to two digits or one place, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        mean, low, high = (math.nan if v is None else float(v) for v in value)
        return said((mean, low, high))
    return (f"{value:.1f}" if value > 3 else f"{value:.2g}") if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """What JSON knows: None for no number, text for an infinite one."""
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if not isinstance(value, float):
        return value
    return str(value) if math.isinf(value) else None if math.isnan(value) else round(value, 4)
