"""What criteria choose in a cell, by the scores that were taken, and the runs that judge it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence import run
from benchmarks.evidence.cell import Cell
from benchmarks.evidence.design import Design
from benchmarks.evidence.run import Run, Setting
from benchmarks.evidence.store import Store
from layerpeft.errors import SelectionError
from layerpeft.model.costs import Costs
from layerpeft.recipe.tasks import metrics
from layerpeft.selection.budget import best_within

BUDGETS = ("count", "parameters", "steps", "time")
Part = Callable[[Design, Cell, Store], Iterator[Run]]


@dataclass(frozen=True)
class Judged:
    """A choice under a budget: the run that shows what it is worth."""

    name: str
    budget: str
    run: Run


def runs(design: Design, cell: Cell, store: Store, part: str) -> Iterator[Run]:
    """What is missing of a part of the experiment, each once; what rests on others' results comes once those are there."""
    seen = set(store.lines(cell.name))
    for one in PARTS[part](design, cell, store):
        if one.key not in seen:
            seen.add(one.key)
            yield one


def setting(design: Design, cell: str, lines: Mapping[str, Any]) -> Setting | None:
    """A cell with its rates; None until all of them were tried."""
    rates = {}
    for size in design.sizes(cell):
        tried = list(run.rated(design, cell, size))
        if any(one.key not in lines for one in tried):
            return None
        rates[size] = _best(tried, lines)
    return Setting(design, cell, rates)


def _best(tried: Sequence[Run], lines: Mapping[str, Any]) -> float:
    """The rate with the lowest held-out loss, in the mean of its runs."""
    by: dict[float, list[float]] = defaultdict(list)
    for one in tried:
        by[one.lr].append(lines[one.key]["after"]["loss"])
    return min(by, key=lambda lr: statistics.fmean(by[lr]))


def _rates(design: Design, cell: Cell, _: Store) -> Iterator[Run]:
    for size in design.sizes(cell.name):
        yield from run.rated(design, cell.name, size)
    if cell.name in design.method_cells:
        yield from run.tuned(design, cell.name)


def _criteria(design: Design, cell: Cell, _: Store) -> Iterator[Run]:
    return run.scores(design, cell.name)


def _settled(of: Callable[[Setting], Iterable[Run]]) -> Part:
    """A part that has to know the rates."""

    def part(design: Design, cell: Cell, store: Store) -> Iterator[Run]:
        at = setting(design, cell.name, store.lines(cell.name))
        return iter(() if at is None else of(at))

    return part


def _final(design: Design, cell: Cell, store: Store) -> Iterator[Run]:
    lines = store.lines(cell.name)
    at = setting(design, cell.name, lines)
    return iter(() if at is None else (judged.run for judged in final(at, cell, lines)))


def _matched(design: Design, cell: Cell, store: Store) -> Iterator[Run]:
    lines = store.lines(cell.name)
    at = setting(design, cell.name, lines)
    return iter(() if at is None else (one.run for one in matched(at, cell, lines)))


def _methods(design: Design, cell: Cell, store: Store) -> Iterator[Run]:
    if cell.name not in design.method_cells:
        return
    lines = store.lines(cell.name)
    best = best_rates(design, cell.name, lines)
    yield from run.methods(design, cell.name, best, equal_steps(design, cell.name, lines, best))


PARTS: Mapping[str, Part] = {
    "rates": _rates, "criteria": _criteria, "oracle": _settled(run.oracle), "final": _final, "matched": _matched,
    "methods": _methods, "more": _settled(run.more),
}  # fmt: skip


def taken(design: Design, cell: str, lines: Mapping[str, Any], seed: int) -> dict[str, tuple[float, ...]]:
    """The scores of a seed by the name of their criterion, products of ranks among them."""
    found = {}
    for one in run.scores(design, cell):
        if one.kind == "score" and one.seed == seed and one.key in lines:
            found[one.select["name"]] = tuple(lines[one.key]["scores"])
    for name, parts in design.criteria.products.items():
        if all(part in found for part in parts):
            found[name] = together([found[part] for part in parts])
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """From 0 for the lowest, so that it adds nothing to a set; those that are equal share their mean."""
    return [rank - 1 for rank in metrics.ranks(values)]


def together(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of ranks over criteria."""
    return tuple(sum(column) / len(scores) for column in zip(*map(ranks, scores), strict=True))


def top(values: Sequence[float], keep: int) -> tuple[int, ...]:
    """The layers with the highest scores, ascending; of equal ones the lower first."""
    return tuple(sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]))


def within(values: Sequence[float], costs: Costs, share: float) -> tuple[int, ...]:
    """The set of the largest sum of ranks within a share of the operations of all layers; empty where that holds no layer."""
    everyone = range(len(values))
    try:
        return best_within(ranks(values), everyone, costs, share * costs.of(everyone))
    except SelectionError:
        return ()


def final(at: Setting, cell: Cell, lines: Mapping[str, Any]) -> Iterator[Judged]:
    """The choices of every criterion and rule at equal count and at equal time; the other budgets of those that are compared in
    the end."""
    design, compared = at.design, cell.name in at.design.final.cells
    few = f", {design.oracle.keep}"
    for seed in design.oracle.seeds:
        choices = {c: top(v, design.oracle.keep) for c, v in taken(design, cell.name, lines, seed).items()}
        for one in run.scores(design, cell.name):
            if one.kind == "choose" and one.seed == seed and one.key in lines:
                choices[one.select["name"]] = tuple(lines[one.key]["layers"])
        for name, layers in choices.items():
            yield Judged(name, "count", at.run(layers, seed))
            if compared:
                yield Judged(f"{name}{few}", "time", at.run(layers, seed, steps=paid(at, cell, layers)))
    for seed in design.final.seeds if compared else ():
        yield from _compared(at, cell, taken(design, cell.name, lines, seed), seed)


def paid(at: Setting, cell: Cell, layers: Sequence[int]) -> int:
    """As many steps as the operations of all layers' steps pay for."""
    costs = cell.costs
    return at.design.steps(cell.name) * costs.of(range(at.design.layers(cell.name))) // costs.of(layers)


def _compared(at: Setting, cell: Cell, scores: Mapping[str, Sequence[float]], seed: int) -> Iterator[Judged]:
    design, keep, half, r = at.design, at.design.oracle.keep, at.design.final.half, at.design.training.r
    everyone = range(design.layers(cell.name))
    yield Judged("all", "count", at.run(everyone, seed))
    yield Judged("all", "parameters", at.run(everyone, seed, max(1, r * keep // len(everyone))))
    for criterion in (c for c in design.final.criteria if c in scores):
        values = scores[criterion]
        few, many = top(values, keep), top(values, half)
        yield Judged(f"{criterion}, {keep}", "parameters", at.run(few, seed))
        yield Judged(f"{criterion}, {half}", "parameters", at.run(many, seed, r * keep // half))
        choices = {f"{criterion}, {keep}": few, f"{criterion}, {half}": many}
        shares = {f"{criterion}, time: {s:.0%}": within(values, cell.costs, s) for s in design.final.shares}
        for said, layers in ((said, layers) for said, layers in (choices | shares).items() if layers):
            yield Judged(said, "steps", at.run(layers, seed))
            yield Judged(said, "time", at.run(layers, seed, steps=paid(at, cell, layers)))


@dataclass(frozen=True)
class Length:
    """So many epochs of a choice. Operations of all its steps: with states kept below the lowest layer that trains, and without."""

    name: str
    epochs: int
    run: Run
    kept: float
    whole: float


def matched(at: Setting, cell: Cell, lines: Mapping[str, Any]) -> Iterator[Length]:
    """All layers for some epochs, and every other choice for each of the lengths."""
    asked, name = at.design.matched, cell.name
    everyone = tuple(range(at.design.layers(name)))
    for seed in asked.seeds if name in asked.cells else ():
        scores = taken(at.design, name, lines, seed)
        yield _length(at, cell, "all", everyone, seed, asked.epochs)
        for said, choice in at.design.choices.items():
            if choice.criterion in scores:
                kept = replace(cell.costs, whole=1 / asked.epochs)
                values = scores[choice.criterion]
                layers = top(values, choice.count) if choice.count else within(values, kept, choice.share)
                for epochs in asked.lengths if layers else ():
                    yield _length(at, cell, said, layers, seed, epochs)


def _length(at: Setting, cell: Cell, said: str, layers: Sequence[int], seed: int, epochs: int) -> Length:
    asked = at.design.matched
    steps, costs = epochs * asked.steps, cell.costs
    one = at.run(layers, seed, steps=steps, epoch=asked.steps)
    return Length(said, epochs, one, steps * replace(costs, whole=1 / epochs).of(layers), steps * costs.of(layers))


def best_rates(design: Design, cell: str, lines: Mapping[str, Any]) -> dict[str, float]:
    """The rate of every method with the lowest held-out loss, once all its rates were tried."""
    tried = {name: list(run.rates_of(design, cell, method)) for name, method in design.methods.items()}
    return {name: _best(own, lines) for name, own in tried.items() if all(one.key in lines for one in own)}


def equal_steps(design: Design, cell: str, lines: Mapping[str, Any], best: Mapping[str, float]) -> dict[str, int]:
    """How many steps of every method the operations of the first one's steps pay for, as they were counted."""
    found = {}
    for name in best:
        line = lines[run.counted(design, cell, design.methods[name]).key]
        found[name] = line.get("step", {}).get("operations")
    first = found.get(next(iter(design.methods)))
    return {n: max(1, round(design.steps(cell) * first / own)) for n, own in found.items() if first and own}
