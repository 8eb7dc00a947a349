"""Arms of training side by side: counts of one step, and step times as ratios."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import chart, clock, table
from benchmarks.arm import Arm, Unavailable, read_arms
from benchmarks.case import Case
from benchmarks.model import Batch, Model
from benchmarks.model import check as check_model
from benchmarks.setting import Setting, prepare
from benchmarks.steps import Steps
from benchmarks.trace import traced
from layerpeft.errors import Problems, unknown

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is trained by which arms.

    `setting`: `checkpointed` means gradient checkpointing and inputs that require gradients, as TRL sets them. `rounds`: timed
    steps of each arm, 0 for counts alone; `together: false` builds one arm after the other, for models of which two do not fit,
    and takes the accelerator's own peak; `traced`: tensors have no values, counts alone; `charts: false`: a table alone.
    """

    model: Model
    batch: Batch
    arms: Mapping[str, Any]
    reference: str
    setting: Setting = "plain"
    rounds: int = 15
    warm_up: int = 3
    threads: int = 1
    seed: int = 0
    together: bool = True
    traced: bool = False
    charts: bool = True


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)
    read_arms(options.arms, problems)
    if options.reference not in options.arms:
        problems.add(f"reference: {unknown('label', options.reference, options.arms)}")
    if options.warm_up < 1:
        problems.add(
            f"warm_up: {options.warm_up} is not at least 1; optimizer states have to exist before they are counted"
        )
    if options.traced and options.rounds:
        problems.add("rounds: tensors without values take no time; write rounds: 0")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """The arms' rows, each with counts and, where it was timed, ratios to the reference."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    arms = read_arms(options.arms, Problems(case.name))
    if options.traced:
        measured = {arm.label: _traced(arm, options, say) for arm in arms}
    elif options.together:
        measured = _together(arms, options, say)
    else:
        measured = _one_by_one(arms, options, say)
    return {"arms": {arm.label: arm.to_dict() | measured[arm.label] for arm in arms}}


def _traced(arm: Arm, options: Options, say: Say) -> dict[str, Any]:
    say(f"{arm.label}: traced")
    try:
        return {"counts": traced(arm, options.model, options.batch, lambda r: prepare(r, options.setting))}
    except Unavailable as error:
        return {"skipped": str(error)}


def _together(arms: Sequence[Arm], options: Options, say: Say) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Steps] = {}
    for arm in arms:
        try:
            steps[arm.label] = Steps(arm, options.model, options.batch, options.setting, options.seed)
        except Unavailable as error:
            found[arm.label] = {"skipped": str(error)}
            continue
        for _ in range(options.warm_up):
            steps[arm.label]()
        found[arm.label] = {"counts": steps[arm.label].counts()}
        say(f"{arm.label}: counted")
    if options.rounds:
        options_of = {arm.label: arm.options for arm in arms}
        times = clock.interleaved(steps, options.rounds, options.seed)
        for label, row in clock.ratios(times, options.reference).items():
            found[label] |= {"time": row, "step_seconds": round(statistics.median(times[label]), 4)}
            if gap := getattr(options_of[label], "update_proj_gap", None):
                found[label] |= steps[label].refreshes(times[label], gap)
            say(f"{label}: {row['median']:.3f} of the time of {options.reference}")
    return found


def _one_by_one(arms: Sequence[Arm], options: Options, say: Say) -> dict[str, dict[str, Any]]:
    device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for arm in arms:
        try:
            found[arm.label], times[arm.label] = _alone(arm, options, device)
        except Unavailable as error:
            found[arm.label] = {"skipped": str(error)}
        except torch.OutOfMemoryError:
            found[arm.label] = {"skipped": "out of memory"}
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        say(f"{arm.label}: done")
    timed = {label: values for label, values in times.items() if values}
    if options.reference in timed:
        for label, row in clock.ratios(timed, options.reference, paired=False).items():
            found[label] |= {"time": row, "step_seconds": round(statistics.median(timed[label]), 4)}
    return found


def _alone(arm: Arm, options: Options, device: str) -> tuple[dict[str, Any], list[float]]:
    """One arm from its building to its last step, with the accelerator's own peak over whole steps."""
    torch.manual_seed(options.seed)
    steps = Steps(arm, options.model, options.batch, options.setting, options.seed, device)
    for _ in range(options.warm_up):
        steps()
    row: dict[str, Any] = {"counts": steps.counts()}
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    seconds = [clock.seconds(steps) for _ in range(options.rounds)]
    if device != "cpu":
        row["accelerator_peak_bytes"] = int(torch.accelerator.max_memory_allocated())
    return row, seconds


def tables(result: Mapping[str, Any]) -> str:
    """The arms as a Markdown table."""
    return table.arms(result["arms"], result["case"]["reference"])


def draw(result: Mapping[str, Any], path: Path) -> Path | None:
    """Bars of operations, bytes and time."""
    if not result["case"].get("charts", True):
        return None
    return chart.arms(result["arms"], result["case"]["reference"], result["title"], path)
