"""What recipes of trainers by rewards earn in their first and last steps: is something learned, and what."""

from __future__ import annotations

import json
import math
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

Say = Callable[[str], None]
MEANS = ("reward", "objective/scores")  # TRL's names of the mean reward of a step; the second is that of online_dpo
RIGHT = "rewards/correct_answer/mean"  # TRL's name of what that function gave, which is the share of right answers


@dataclass(frozen=True)
class Options:
    """`recipes`: name -> settings (`key=value`) over it; `seeds`: name -> those of its runs; `window`: steps at either end."""

    recipes: Mapping[str, Any]
    seeds: Mapping[str, Any]
    window: int = 5
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    if options.window < 2:
        problems.add(f"window: {options.window} is not at least 2")
    for name, settings in options.recipes.items():
        if not isinstance(settings, list) or not all(isinstance(s, str) and "=" in s for s in settings):
            problems.add(f"recipes: {name}: expected a list of key=value, got {settings!r}")
            continue
        try:
            load_recipe(name, settings)
        except LayerpeftError as error:
            problems.add(f"recipes: {name}: {error}")
    if set(options.seeds) != set(options.recipes):
        problems.add(f"seeds: expected a list for each of {', '.join(options.recipes)}, got {', '.join(options.seeds)}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """The mean reward of every step by recipe and seed, and what the two ends say of it."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    runs = []
    for name, settings in options.recipes.items():
        for seed in options.seeds[name]:
            with tempfile.TemporaryDirectory() as folder:
                extra = [f"seed={seed}", f"output_dir={folder}", "overwrite_output_dir=true", "logging_steps=1"]
                train.run(load_recipe(name, [*settings, *extra]), lambda _: None)
                lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
            one = {"recipe": name, "seed": seed, **earned([json.loads(line) for line in lines], options.window)}
            runs.append(one)
            say(f"{name}, seed {seed}: {one['first']:.2f} to {one['last']:.2f}, z {one['z']:.1f}")
    return {"runs": runs}


def earned(log: Sequence[Mapping[str, Any]], window: int) -> dict[str, Any]:
    """Of the log of a run that logs every step: rewards, their means over the first and the last steps, the difference of these
    in standard errors of the two, and the share of right answers in the last steps, where a function counts them."""
    rewards = [line[name] for line in log for name in MEANS if name in line]
    right = [line[RIGHT] for line in log if RIGHT in line]
    ends = rewards[:window], rewards[-window:]
    first, last = map(statistics.fmean, ends)
    error = math.sqrt(sum(statistics.variance(end) / window for end in ends))
    return {
        "rewards": [round(reward, 5) for reward in rewards],
        "first": round(first, 5),
        "last": round(last, 5),
        "z": round((last - first) / error, 3) if error else None,
        "right": round(statistics.fmean(right[-window:]), 5) if right else None,
    }


def tables(result: Mapping[str, Any]) -> str:
    """One line per recipe and seed."""
    window = result["case"]["window"]
    head = [
        "recipe",
        "seed",
        f"first {window} steps",
        f"last {window} steps",
        "z",
        f"right answers, last {window} steps",
    ]
    lines = []
    for run in result["runs"]:
        right = "" if run["right"] is None else f"{100 * run['right']:.1f} %"
        line = [f"`{run['recipe']}`", str(run["seed"]), f"{run['first']:.3f}", f"{run['last']:.3f}", f"{run['z']:.1f}"]
        lines.append([*line, right])
    return table.markdown(head, lines)


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """The mean reward over the steps, a line per run."""
    curves = {
        f"{run['recipe']}, seed {run['seed']}": (list(range(1, len(run["rewards"]) + 1)), run["rewards"])
        for run in result["runs"]
    }
    return chart.curves(curves, ("optimizer steps", "mean reward"), result["title"], path)
