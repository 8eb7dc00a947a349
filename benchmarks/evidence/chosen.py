"""What criteria choose in a cell, by the scores that were taken, and the runs that judge it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence import run
from benchmarks.evidence.cell import Cell
from benchmarks.evidence.design import Design
from benchmarks.evidence.run import Run, layers_run
from benchmarks.evidence.store import Store
from layerpeft.errors import SelectionError
from layerpeft.model.costs import Costs
from layerpeft.recipe.tasks import metrics
from layerpeft.selection.budget import best_within

BUDGETS = ("count", "parameters", "steps", "time")


@dataclass(frozen=True)
class Judged:
    """A choice under a budget: the run that shows what it is worth."""

    name: str
    budget: str
    run: Run


def runs(design: Design, cell: Cell, store: Store, part: str) -> Iterator[Run]:
    """Those of a part of the experiment; what rests on others' results is there once those are."""
    if part == "oracle":
        yield from run.oracle(design, cell.name)
    elif part == "pairs":
        yield from run.pairs(design, cell.name)
    elif part == "criteria":
        yield from run.scores(design, cell.name)
    elif part == "final":
        seen: set[str] = set()
        for judged in final(design, cell, store.lines(cell.name)):
            if judged.run.key not in seen:
                seen.add(judged.run.key)
                yield judged.run
    else:
        yield from run.tuned(design, cell.name)
        lines = store.lines(cell.name)
        best = best_rates(design, cell.name, lines)
        seen = set()
        for one in run.methods(design, cell.name, best, equal_steps(design, cell.name, lines, best)):
            if one.key not in seen:  # a step of some methods takes as much as one of all layers
                seen.add(one.key)
                yield one


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


def final(design: Design, cell: Cell, lines: Mapping[str, Any]) -> Iterator[Judged]:
    """The choices of every criterion and rule at equal count; the other budgets of those that are compared in the end."""
    keep, name = design.oracle.keep, cell.name
    for seed in design.oracle.seeds:
        for criterion, values in taken(design, name, lines, seed).items():
            yield Judged(criterion, "count", layers_run(design, name, top(values, keep), seed))
        for one in run.scores(design, name):
            if one.kind == "choose" and one.seed == seed and one.key in lines:
                yield Judged(one.select["name"], "count", layers_run(design, name, lines[one.key]["layers"], seed))
    for seed in design.final.seeds if name in design.final.cells else ():
        yield from _compared(design, cell, taken(design, name, lines, seed), seed)


def _compared(design: Design, cell: Cell, scores: Mapping[str, Sequence[float]], seed: int) -> Iterator[Judged]:
    name, keep, half, asked = cell.name, design.oracle.keep, design.final.half, design.training
    everyone, costs = range(design.layers(cell.name)), cell.costs

    def steps(layers: Sequence[int]) -> int:
        """As many as the operations of all layers' steps pay for."""
        return asked.steps * costs.of(everyone) // costs.of(layers)

    yield Judged("all", "count", layers_run(design, name, everyone, seed))
    yield Judged("all", "parameters", layers_run(design, name, everyone, seed, max(1, asked.r * keep // len(everyone))))
    for criterion in (c for c in design.final.criteria if c in scores):
        values = scores[criterion]
        few, many = top(values, keep), top(values, half)
        yield Judged(criterion, "parameters", layers_run(design, name, few, seed))
        yield Judged(f"{criterion}, {half}", "parameters", layers_run(design, name, many, seed, asked.r * keep // half))
        choices = {f"{criterion}, {keep}": few, f"{criterion}, {half}": many}
        choices |= {f"{criterion}, time: {share:.0%}": within(values, costs, share) for share in design.final.shares}
        for said, layers in ((said, layers) for said, layers in choices.items() if layers):
            yield Judged(said, "steps", layers_run(design, name, layers, seed))
            yield Judged(said, "time", layers_run(design, name, layers, seed, steps=steps(layers)))


def best_rates(design: Design, cell: str, lines: Mapping[str, Any]) -> dict[str, float]:
    """The rate of every method with the lowest held-out loss, once all its rates were tried."""
    found = {}
    tried = [one for one in run.tuned(design, cell) if one.key in lines]
    for name, method in design.methods.items():
        own = [one for one in tried if one.key in {mine.key for mine in run.rates_of(design, cell, method)}]
        if len(own) == len(method.rates):
            found[name] = min(own, key=lambda one: lines[one.key]["after"]["loss"]).lr
    return found


def equal_steps(design: Design, cell: str, lines: Mapping[str, Any], best: Mapping[str, float]) -> dict[str, int]:
    """How many steps of every method the operations of the first one's steps pay for, as they were counted at its best rate."""
    found = {}
    for name, lr in best.items():
        line = lines[run.of_method(design, cell, design.methods[name], run.TUNING, lr).key]
        found[name] = line.get("step", {}).get("operations")
    first = found.get(next(iter(design.methods)))
    return {n: max(1, round(design.training.steps * first / own)) for n, own in found.items() if first and own}
