"""What a step costs that renews every projection at once, beside an ordinary step of the same arm."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock, table
from benchmarks.arm import Unavailable, read_arms
from benchmarks.case import Case
from benchmarks.model import Batch, Model
from benchmarks.model import check as check_model
from benchmarks.setting import Setting
from benchmarks.steps import Steps
from layerpeft.errors import Problems

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`rounds` refreshes of each arm, each after an ordinary step; `folds` refreshes come before what is timed."""

    model: Model
    batch: Batch
    arms: Mapping[str, Any]
    setting: Setting = "plain"
    rounds: int = 5
    folds: int = 2
    threads: int = 1
    seed: int = 0


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)
    for arm in read_arms(options.arms, problems):
        if getattr(arm.options, "stagger", False):
            problems.add(f"arms.{arm.label}: its refreshes are spread over steps; write stagger: false")
        elif not hasattr(arm.options, "update_proj_gap"):
            problems.add(f"arms.{arm.label}: {arm.name} renews nothing")
    if options.rounds < 1:
        problems.add(f"rounds: {options.rounds} is not at least 1")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Seconds of an ordinary step and of a refresh, and the ratio of neighbours."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    rows = {}
    for arm in read_arms(options.arms, Problems(case.name)):
        try:
            steps = Steps(arm, options.model, options.batch, options.setting, options.seed)
        except Unavailable as error:
            rows[arm.label] = arm.to_dict() | {"skipped": str(error)}
            continue
        rows[arm.label] = arm.to_dict() | _row(steps, options)
        say(f"{arm.label}: a refresh takes {rows[arm.label]['refresh']['median']:.2f} ordinary steps")
    return {"arms": rows}


def _row(steps: Steps, options: Options) -> dict[str, Any]:
    refresh = steps.ready.refresh
    assert refresh is not None
    steps()  # the first step makes optimizer states, and the first projections
    for _ in range(options.folds):
        steps()
        refresh()
        steps()
    ordinary, renewing = [], []
    for _ in range(options.rounds):
        ordinary.append(clock.seconds(steps))
        refresh()
        renewing.append(clock.seconds(steps))
    ratios = [b / a for a, b in zip(ordinary, renewing, strict=True)]
    return {"step_seconds": round(statistics.median(ordinary), 4), "refresh": clock.spread(ratios)}


def tables(result: Mapping[str, Any]) -> str:
    """One line per arm."""
    lines = []
    for label, row in result["arms"].items():
        if "skipped" in row:
            lines.append([f"`{label}`", row["skipped"], ""])
        else:
            lines.append([f"`{label}`", f"{row['step_seconds']:.2f} s", table.ratio_text(row["refresh"])])
    return table.markdown(["arm", "an ordinary step", "a step that renews all, in ordinary steps"], lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
