"""Recipes beside each other: the same recipe with other settings, over several seeds, by its own held-out number."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import chart, table
from benchmarks.case import Case
from layerpeft.errors import LayerpeftError, Problems
from layerpeft.recipe import train
from layerpeft.recipe.read import load_recipe
from layerpeft.text import size_text

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`arms`: label -> settings (`key=value`) over the `recipe`; `common`: settings of all; `measure`: the number of a result."""

    recipe: str
    arms: Mapping[str, Any]
    measure: str
    common: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    if not options.arms or not options.seeds:
        problems.add("arms, seeds: none given")
    for label, settings in options.arms.items():
        if not isinstance(settings, list) or not all(isinstance(s, str) and "=" in s for s in settings):
            problems.add(f"arms: {label}: expected a list of key=value, got {settings!r}")
            continue
        try:
            load_recipe(options.recipe, [*options.common, *settings])
        except LayerpeftError as error:
            problems.add(f"arms: {label}: {error}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """The arms' rows: the number before and after by seed, and in what share of the steps each layer trained."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, Any]] = {label: {"runs": []} for label in options.arms}
    for seed in options.seeds:
        for label, settings in options.arms.items():
            with tempfile.TemporaryDirectory() as folder:
                extra = [f"seed={seed}", f"output_dir={folder}", "overwrite_output_dir=true"]
                result = train.run(load_recipe(options.recipe, [*options.common, *settings, *extra]), lambda _: None)
            steps = [row.steps or 0 for row in result.report.rows]
            one = {"seed": seed, "before": result.before[options.measure], "after": result.after[options.measure]}
            found[label]["runs"].append(
                one | {"steps": steps, "seconds": round(result.seconds, 1), "weight_bytes": result.weight_bytes}
            )
            say(f"{label}, seed {seed}: {options.measure} {one['after']:.4f} ({result.seconds:.0f} s)")
    for row in found.values():
        after = [one["after"] for one in row["runs"]]
        row["mean"], row["spread"] = statistics.mean(after), statistics.stdev(after) if len(after) > 1 else None
    return {"results": found}


def tables(result: Mapping[str, Any]) -> str:
    """One line per arm."""
    rows = result["results"]
    seeds = [one["seed"] for one in next(iter(rows.values()))["runs"]]
    head = ["settings", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation", "layers a step, mean"]
    sized = all(one.get("weight_bytes") for row in rows.values() for one in row["runs"])
    head += ["weights"] if sized else []
    lines = []
    for label, row in rows.items():
        shares = [sum(one["steps"]) / most for one in row["runs"] if (most := max(one["steps"]))]
        layers = f"{statistics.mean(shares):.1f}" if shares else "all"  # nobody counts where nothing is chosen
        spread = f"{row['spread']:.4f}" if row["spread"] is not None else ""
        line = [label, *(f"{one['after']:.4f}" for one in row["runs"]), f"{row['mean']:.4f}", spread, layers]
        lines.append(line + ([size_text(row["runs"][0]["weight_bytes"])] if sized else []))
    return (
        f"{table.markdown(head, lines)}\n\n`{result['case']['measure']}`; more is better for a score, less for a loss."
    )


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """In how many steps each layer trained, the mean of the seeds, a line per arm."""
    curves = {}
    for label, row in result["results"].items():
        means = [statistics.mean(at) for at in zip(*(one["steps"] for one in row["runs"]), strict=True)]
        if any(means):
            curves[label] = (list(range(len(means))), means)
    return chart.curves(curves, ("layer", "steps in which it trained"), result["title"], path)
