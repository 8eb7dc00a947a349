"""`layerpeft advise` on recipes: what it costs, what it says, and whether the runs that follow bear it out.

What it recommends is compared with all layers, with random ones and with the last ones, as many, in as much time (operations),
under several training seeds.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from benchmarks.case import Case
from layerpeft.errors import Problems, unknown
from layerpeft.recipe.advice_text import told
from layerpeft.recipe.advise import Advice, advise
from layerpeft.recipe.compare import Fairly, compare
from layerpeft.recipe.comparing.arms import parse_arms
from layerpeft.recipe.comparing.budgets import parse_budget
from layerpeft.recipe.comparing.names import group_of
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.shipped import recipes
from layerpeft.text import ranges

Say = Callable[[str], None]
OURS, WHOLE = "recommended", "all"


@dataclass(frozen=True)
class Options:
    """Shipped recipes, each with settings over its own; the arms, seeds and budget of the comparison that follows."""

    recipes: Mapping[str, Sequence[str]]
    compare_with: str = "all,random:3,last"
    seeds: int = 3
    budget: str = "time"
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    for name in options.recipes:
        if name not in recipes():
            problems.add(f"recipes: {unknown('recipe', name, recipes())}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Advice for every recipe, and what followed it."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    return {"recipes": [_followed(name, settings, options, say) for name, settings in options.recipes.items()]}


def _followed(name: str, settings: Sequence[str], options: Options, say: Say) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        recipe = load_recipe(name, settings, "score")
        found = advise(recipe)
        say(told(found))
        best = next(one for one in found.choices if one.layers == found.recommended)
        changed = f"layerpeft.select={ranges(found.recommended, ',')}"
        chosen = load_recipe(name, [*settings, changed], "compare")
        fairly = Fairly(options.seeds, parse_budget(options.budget))
        after = compare(chosen, parse_arms(options.compare_with, options.seeds), say, fairly).to_dict()
        return {
            "recipe": name, "settings": list(settings), "advice": found.to_dict(), "text": told(found),
            "foretold": None if best.kept is None else list(best.kept.time), "steps": _steps(found, after),
            "comparison": after, "came": _came(after),
        }  # fmt: skip


def _steps(found: Advice, after: Mapping[str, Any]) -> float:
    """How many training steps of all layers scoring took as long as, by the runs that followed."""
    each = statistics.median(run["seconds"] / run["steps"] for run in after["runs"] if run["arm"] == WHOLE)
    return round(found.seconds / each, 1)


def _came(after: Mapping[str, Any]) -> dict[str, list[float]]:
    """What the recommended layers and the arms gained, in parts of the mean gain of all layers; by seed, of draws their mean."""
    sign = 1 if after["measure"] == "eval_loss" else -1
    by: dict[str, dict[int, list[float]]] = {}
    for run in after["runs"]:
        arm = OURS if run["arm"] == after["runs"][0]["arm"] else group_of(run["arm"])
        by.setdefault(arm, {}).setdefault(run["seed"], []).append(sign * (after["before"] - run["value"]))
    means = {arm: [statistics.fmean(values) for _, values in sorted(seeds.items())] for arm, seeds in by.items()}
    unit = statistics.fmean(means[WHOLE])
    return {arm: [round(value / unit, 4) for value in values] for arm, values in means.items()}


def tables(result: Mapping[str, Any]) -> str:
    """One line per recipe: what was recommended and at what cost, what was foretold of its gain, and what came."""
    head = ["recipe", "recommended", "passes", "as long as", "of a step", "foretold", "came", "random", "last"]
    return table.markdown(head, [_line(one) for one in result["recipes"]])


def _line(one: Mapping[str, Any]) -> list[str]:
    advice, came = one["advice"], one["came"]
    flops = {tuple(choice["layers"]): choice["flops"] for choice in advice["choices"]}
    layers = advice["recommended"]
    share = flops[tuple(layers)] / max(flops.values())
    foretold = "" if one["foretold"] is None else "{:.2f} ({:.2f} to {:.2f})".format(*one["foretold"])
    return [
        f"`{one['recipe']}`", ranges(layers), str(advice["passes"]), f"{one['steps']:.0f} steps", f"{share:.2f}", foretold,
        *(_said(came.get(arm, [])) for arm in (OURS, "random", "last")),
    ]  # fmt: skip


def _said(values: Sequence[float]) -> str:
    """The mean over seeds, least and most."""
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
