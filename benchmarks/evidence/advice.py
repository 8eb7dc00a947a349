"""What `layerpeft advise` is told of the experiment: the criteria that were judged together, and what choices by a rule gained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import tables
from benchmarks.evidence.correlated import correlations
from benchmarks.evidence.design import Design
from benchmarks.evidence.found import Found
from benchmarks.evidence.run import Run
from benchmarks.evidence.store import by_rows
from layerpeft.errors import ConfigError
from layerpeft.recipe.evidence import FILE

# the rules that advice chooses among, by the choice that stands for each: of criteria together, or of depth
RULES: Mapping[str, str] = {
    "time": "{together}, time: 75%",
    "quarter": "{together}, {keep}",
    "half": "{together}, {half}",
    "last": "depth, {keep}",
    "last half": "depth, {half}",
    "all": "all",
}


def write(founds: Sequence[Found], path: Path = FILE) -> Path:
    """Writes what the package ships. Raises: ConfigError where too little has run."""
    judged = [found for found in founds if ("all", "time") in found.judged]
    if not judged:
        raise ConfigError("no cell has its final runs: python -m benchmarks.evidence --data DIR run --part final")
    data = {
        "source": _source(founds, judged),
        "criteria": _criteria(founds),
        "kept": _kept(judged),
        "methods": _methods(founds),
    }
    path.write_text(by_rows(data), encoding="utf-8")
    return path


def _source(founds: Sequence[Found], judged: Sequence[Found]) -> str:
    cells, final = ", ".join(f.name for f in founds), ", ".join(f.name for f in judged)
    design = founds[0].design
    return (
        f"benchmarks/evidence, {design.registered}: models of 12 layers and 6 million weights or fewer, LoRA, criteria on {cells}; "
        f"gains on {final}"
    )


def _criteria(founds: Sequence[Found]) -> list[dict[str, Any]]:
    """The parts of the product that was judged in the end: of what is chosen by other criteria together nobody knows what it gains.
    Correlations over all cells."""
    design = founds[0].design
    rows = {r[1]: r for r in tables.overall(tables.criteria(founds))}
    cells = sum(bool(one.sets) for f in founds for name, one in correlations(f).items() if name == "depth")
    return [
        {
            "name": name.removesuffix(" (ours)"), "select": dict(design.criteria.scores[name]),
            "alone": _numbers(rows[name][2]), "sets": _numbers(rows[name][3]), "cells": cells,
        }
        for name in design.criteria.products[_together(design)]
    ]  # fmt: skip


def _together(design: Design) -> str:
    """The product that was judged in the end."""
    return next(name for name in design.final.criteria if name in design.criteria.products)


def _kept(judged: Sequence[Found]) -> list[dict[str, Any]]:
    design = judged[0].design
    words = {"together": _together(design)}
    words |= {"keep": str(design.oracle.keep), "half": str(design.final.half)}
    found = []
    for rule, choice in RULES.items():
        name = choice.format(**words)
        spans = {budget: [_share(f, name, budget) for f in judged] for budget in ("steps", "time")}
        if all(not math.isnan(v) for values in spans.values() for v in values):
            found.append({"rule": rule, **{b: _over(values) for b, values in spans.items()}, "cells": len(judged)})
    return found


def _methods(founds: Sequence[Found]) -> list[dict[str, Any]]:
    """What methods gain, in parts of what the first one does at equal steps, once all of them have run in a cell of methods."""
    known = [_of_methods(f) for f in founds if f.name in f.design.method_cells]
    shares = [one for one in known if one is not None]
    found = []
    for name in shares[0] if shares else ():
        spans = {budget: _over([one[name][at] for one in shares]) for at, budget in enumerate(("steps", "time"))}
        found.append({"name": name, **spans, "cells": len(shares)})
    return found


def _of_methods(found: Found) -> dict[str, tuple[float, float]] | None:
    """Mean gains of every method, at equal steps and at equal operations, in parts of the first one's at equal steps; None where
    some have not run."""
    means = {name: (_mean(found, one.equal), _mean(found, one.longer)) for name, one in tables.tried(found).items()}
    if set(means) < set(found.design.methods) or any(math.isnan(mean) for both in means.values() for mean in both):
        return None
    unit = means[next(iter(found.design.methods))][0]
    return {name: (steps / unit, time / unit) for name, (steps, time) in means.items()}


def _mean(found: Found, runs: Mapping[int, Run]) -> float:
    """The mean gain of runs; not a number where one is missing."""
    gains = [found.gain(one) for one in runs.values()]
    return statistics.fmean(math.nan if gain is None else gain for gain in gains)


def _share(found: Found, name: str, budget: str) -> float:
    """The mean gain of a choice, in parts of that of all layers."""
    shares = found.share(name, budget)
    return statistics.fmean(shares.values()) if shares else math.nan


def _over(values: Sequence[float]) -> list[float]:
    """Mean, least and most over cells."""
    return [round(v, 3) for v in (statistics.fmean(values), min(values), max(values))]


def _numbers(span: Sequence[float]) -> list[float | None]:
    return [round(v, 3) if math.isfinite(v) else None for v in span]
