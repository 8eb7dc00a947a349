"""A cell with the lines that it has: gains, by layers, by choice and budget, and seed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.evidence import chosen, run
from benchmarks.evidence.cell import Cell
from benchmarks.evidence.design import Design
from benchmarks.evidence.store import Store

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Found:
    """A cell with its lines, by the key of their run. A gain is how much the held-out loss falls."""

    cell: Cell
    lines: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def design(self) -> Design:
        return self.cell.design

    @property
    def count(self) -> int:
        return self.design.layers(self.name)

    @cached_property
    def setting(self) -> run.Setting | None:
        """None until all rates were tried."""
        return chosen.setting(self.design, self.name, self.lines)

    def gain(self, one: run.Run) -> float | None:
        """None where the run has not been made."""
        line = self.lines.get(one.key)
        return None if line is None else line["before"]["loss"] - line["after"]["loss"]

    def rise(self, one: run.Run) -> float | None:
        """How much the loss on the text of pre-training rises; None where that is not known."""
        line = self.lines.get(one.key)
        if line is None or line["after"]["retained"] is None:
            return None
        return line["after"]["retained"] - line["before"]["retained"]

    def gains(self, layers: Sequence[int], seeds: Sequence[int]) -> dict[int, float]:
        """Those of a set at equal steps, by seed, as far as it has run."""
        at = self.setting
        runs = {seed: at.run(layers, seed) for seed in seeds} if at else {}
        return {seed: gain for seed, one in runs.items() if (gain := self.gain(one)) is not None}

    @cached_property
    def all_layers(self) -> dict[int, float]:
        """Gains of all layers by the final seeds."""
        return self.gains(range(self.count), self.design.final.seeds)

    @cached_property
    def alone(self) -> tuple[list[int], dict[int, BySeed]]:
        """Seeds of which every layer has run by itself, and gains by layer and seed."""
        return self._complete({i: self.gains([i], self.design.oracle.seeds) for i in range(self.count)})

    @cached_property
    def drawn(self) -> tuple[list[int], dict[tuple[int, ...], BySeed]]:
        """Seeds of which every drawn set of the oracle has run, and gains by set; those that are added, where they have run for
        these seeds."""
        sets, seeds = run.sets(self.design, self.name), self.design.oracle.seeds
        first = sets[: self.design.oracle.sets]
        shared, found = self._complete({layers: self.gains(layers, seeds) for layers in first})
        more = {layers: self.gains(layers, seeds) for layers in sets[len(first) :]}
        return shared, {**found, **{k: by for k, by in more.items() if shared and set(shared) <= set(by)}}

    @cached_property
    def pairs(self) -> tuple[list[int], dict[tuple[int, ...], BySeed]]:
        """Seeds of which every pair has run, and gains by pair."""
        seeds = self.design.oracle.seeds
        every = [(i, j) for j in range(self.count) for i in range(j)]
        return self._complete({pair: self.gains(pair, seeds) for pair in every})

    def _complete(self, found: dict[Any, BySeed]) -> tuple[list[int], dict[Any, BySeed]]:
        return [s for s in self.design.oracle.seeds if all(s in by for by in found.values())], found

    @cached_property
    def judged(self) -> dict[tuple[str, str], dict[int, chosen.Judged]]:
        """What has run of the choices, by their name and budget, and seed; all layers among them."""
        found: dict[tuple[str, str], dict[int, chosen.Judged]] = defaultdict(dict)
        if self.setting is None:
            return found
        for one in chosen.final(self.setting, self.cell, self.lines):
            if one.run.key in self.lines:
                found[one.name, one.budget][one.run.seed] = one
        compared = self.name in self.design.final.cells
        for seed in self.all_layers:
            for budget in ("count", "steps", "time") if compared else ("count",):
                found["all", budget][seed] = chosen.Judged("all", budget, self.setting.run(range(self.count), seed))
        return found

    def gains_of(self, name: str, budget: str) -> dict[int, float]:
        """Of a choice under a budget, by seed."""
        runs = self.judged.get((name, budget), {})
        return {seed: gain for seed, one in runs.items() if (gain := self.gain(one.run)) is not None}

    @cached_property
    def lengths(self) -> list[chosen.Length]:
        """All layers, and every length of the other choices."""
        return [] if self.setting is None else list(chosen.matched(self.setting, self.cell, self.lines))

    @cached_property
    def best(self) -> dict[str, float]:
        """By budget the largest mean gain that is known: of a choice, at equal count of a drawn set too."""
        found: dict[str, float] = {}
        for name, budget in self.judged:
            if (name, budget) != ("all", "count"):
                mean = statistics.fmean(self.gains_of(name, budget).values())
                found[budget] = max(mean, found.get(budget, 0.0))
        shared, drawn = self.drawn
        sets = [statistics.fmean(by[s] for s in shared) for by in drawn.values()] if shared else []
        return {**found, "count": max([found.get("count", 0.0), *sets])}

    @cached_property
    def whole(self) -> float:
        """What all layers gain, in the mean of their seeds."""
        return statistics.fmean(self.all_layers.values()) if self.all_layers else float("nan")

    def share(self, name: str, budget: str) -> dict[int, float]:
        """What a choice gains, in parts of what all layers gain; by seed."""
        return {seed: gain / self.whole for seed, gain in self.gains_of(name, budget).items()}

    def regret(self, name: str, budget: str) -> dict[int, float]:
        """What a choice lacks of the best known gain, in the same parts; by seed."""
        return {seed: (self.best[budget] - gain) / self.whole for seed, gain in self.gains_of(name, budget).items()}


def cells(
    design: Design, store: Store, data: Path | None, models: Path, names: Sequence[str] | None = None
) -> list[Found]:
    """Those that have begun, in the order of the design; all, or those of these names."""
    found = ((name, store.lines(name)) for name in names or design.cells)
    return [Found(Cell(design, name, data, models), lines) for name, lines in found if lines]
