"""Gradient projection side by side, after folds: bytes on every step of a whole period, all state by part, step times as ratios."""

from __future__ import annotations

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
from benchmarks.setting import Setting
from benchmarks.steps import Steps
from layerpeft.errors import Problems, unknown
from layerpeft.text import size_text

Say = Callable[[str], None]
# what a method holds -> its heading
STATE = {
    "trained": "B",
    "basis": "Q",
    "sketching": "Ω and sketches",
    "moments": "moments",
    "originals": "originals beside",
    "folds": "folds (host)",
}


@dataclass(frozen=True)
class Options:
    """Arms that project gradients. Counts and times are taken when every projected weight has been written `folds` times.

    Counted are as many steps as the longest `update_proj_gap` of the arms, and timed as many (`timed: false`: none);
    `charts: false`: tables alone.
    """

    model: Model
    batch: Batch
    arms: Mapping[str, Any]
    reference: str
    setting: Setting = "plain"
    folds: int = 2
    timed: bool = True
    charts: bool = True
    threads: int = 1
    seed: int = 0


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)
    for arm in read_arms(options.arms, problems):
        if not hasattr(arm.options, "update_proj_gap"):
            problems.add(f"arms.{arm.label}: {arm.name} projects no gradients")
    if options.reference not in options.arms:
        problems.add(f"reference: {unknown('label', options.reference, options.arms)}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """The arms' rows: counts of an ordinary step, the worst of a period, state by part, ratios of step times."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    arms = read_arms(options.arms, Problems(case.name))
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Steps] = {}
    for arm in arms:
        try:
            steps[arm.label] = Steps(arm, options.model, options.batch, options.setting, options.seed)
        except Unavailable as error:
            found[arm.label] = {"skipped": str(error)}
            continue
        found[arm.label] = counted(steps[arm.label], arm, options)
        say(f"{arm.label}: counted")
    if options.timed and options.reference in steps:
        _time(arms, steps, options, found, say)
    return {"arms": {arm.label: arm.to_dict() | found[arm.label] for arm in arms}}


def counted(steps: Steps, arm: Arm, options: Options) -> dict[str, Any]:
    """Counts of the first step, then of every step of a period once the folds are there.

    An ordinary step is the median of the period for bytes kept; a worst step is the one that keeps most.
    """
    gap, state = arm.options.update_proj_gap, steps.ready.state
    assert state is not None
    during: list[dict[str, int]] = []
    hook = steps.ready.optimizer.register_step_pre_hook(lambda *_: during.append(state()))
    first = steps.counts()
    _fold(steps, arm, options)
    during.clear()
    period = sorted((steps.counts() for _ in range(gap)), key=lambda counts: counts["kept_bytes"])
    hook.remove()
    parts = {name: max(found.get(name, 0) for found in during) for name in during[0]}
    ordinary, most = period[(gap - 1) // 2], period[-1]
    return {
        "counts": ordinary | _together(ordinary, parts),
        "least_kept_bytes": period[0]["kept_bytes"],
        "worst_kept_bytes": most["kept_bytes"],
        "worst_peak_bytes": max(counts["peak_bytes"] for counts in period),
        "first_kept_bytes": first["kept_bytes"],
        "state": parts,
        "steps_before": steps.number - gap,
    }


def _together(counts: Mapping[str, int], parts: Mapping[str, int]) -> dict[str, int]:
    """Weights without the factors, which are among the state; the state on the device; and both with the peak."""
    factors = parts["trained"] + parts["basis"] if "trained" in parts else 0  # they are the model's parameters
    weights, held = counts["weight_bytes"] - factors, sum(parts.values()) - parts.get("folds", 0)
    return {"weight_bytes": weights, "optimizer_bytes": held, "together_bytes": weights + held + counts["peak_bytes"]}


def _fold(steps: Steps, arm: Arm, options: Options) -> None:
    """Steps until every projected weight has been written often enough; arms that write at every step just warm up."""
    gap, folds = arm.options.update_proj_gap, steps.ready.folds
    for _ in range(2 if folds is None else (options.folds + 1) * gap + 2):
        if folds is not None and folds() >= options.folds:
            return
        steps()
    if folds is not None and folds() < options.folds:
        raise RuntimeError(f"{arm.label}: {folds()} folds after {steps.number} steps")


def _time(
    arms: Sequence[Arm], steps: Mapping[str, Steps], options: Options, found: dict[str, dict[str, Any]], say: Say
) -> None:
    gaps = {arm.label: arm.options.update_proj_gap for arm in arms}
    times = clock.interleaved(steps, max(gaps.values()), options.seed)
    for label, row in clock.ratios(times, options.reference).items():
        found[label] |= {"time": row, "step_seconds": round(statistics.median(times[label]), 4)}
        found[label] |= steps[label].refreshes(times[label], gaps[label])
        say(f"{label}: {row['median']:.3f} of the time of {options.reference}")


def tables(result: Mapping[str, Any]) -> str:
    """One line per arm for steps, and one for what is held between them."""
    rows, reference = result["arms"], result["case"]["reference"]
    unit = rows[reference]
    done = {label: row for label, row in rows.items() if "counts" in row}
    head = ["arm", "trains", "operations", "kept, ordinary step", "kept, worst step", "kept, first step"]
    head += ["gradients", "peak live, worst"] + ["step time"] * any("time" in row for row in done.values())
    lines = []
    for label, row in done.items():
        counts = row["counts"]
        kept = [(counts["kept_bytes"], "kept_bytes")] + [
            (row[f"{w}_kept_bytes"], "kept_bytes") for w in ("worst", "first")
        ]
        cells = [
            _against(value, unit["counts"][key]) for value, key in [*kept, (counts["gradient_bytes"], "gradient_bytes")]
        ]
        cells.append(_against(row["worst_peak_bytes"], unit["worst_peak_bytes"]))
        line = [
            f"`{label}`",
            table.number_text(counts["trainable"]),
            table.count_text("flops", counts, unit["counts"]),
            *cells,
        ]
        lines.append(line + [_time_text(row, label == reference)] * ("time" in row))
    names = [name for name in STATE if any(name in row["state"] for row in done.values())]
    held = [["arm", *(STATE[name] for name in names), "weights, state and peak"]]
    held += [
        [
            f"`{label}`",
            *(size_text(row["state"].get(name, 0)) for name in names),
            size_text(row["counts"]["together_bytes"]),
        ]
        for label, row in done.items()
    ]
    skipped = "".join(f"\n\n`{label}` {row['skipped']}" for label, row in rows.items() if "skipped" in row)
    return f"{table.markdown(head, lines)}\n\n{table.markdown(held[0], held[1:])}{skipped}"


def _time_text(row: Mapping[str, Any], is_unit: bool) -> str:
    text = table.time_text(row)
    return "1" + "".join(text.partition(";")[1:]) if is_unit else text


def _against(value: int, unit: int) -> str:
    return f"{size_text(value)} ({value / unit:.3f})"


def draw(result: Mapping[str, Any], path: Path) -> Path | None:
    """Bars of operations, bytes and time."""
    if not result["case"].get("charts", True):
        return None
    return chart.arms(result["arms"], result["case"]["reference"], result["title"], path)
