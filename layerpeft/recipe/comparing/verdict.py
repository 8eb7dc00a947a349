"""What runs show, and what chance alone would: against random choices of layers, and against other arms, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerpeft.recipe.comparing.runs import Run

# two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; the last one serves beyond (a little too careful)
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
HEADS = {
    "better": "Better than random here",
    "no difference": "No difference shown",
    "worse": "Random was better",
    "unknown": "Nothing can be said about the choice",
}
TOLD = {
    "better": "better than the recipe's arm",
    "worse": "worse than the recipe's arm",
    "no difference": "not told apart from chance",
    "unknown": "nothing can be said",
}


@dataclass(frozen=True)
class Verdict:
    """`kind`: better, no difference, worse, or unknown; and the sentence that says it."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Interval:
    """A mean, and how far it may lie from that of all seeds (or draws), at 95 %; None where one number says nothing of that."""

    mean: float
    margin: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.margin:.4f}" if self.margin is not None else "")


@dataclass(frozen=True)
class Standing:
    """An arm over its runs: its number, and how much better it is than the recipe's arm (`gain`, above 0: better), seed by seed.
    `runs`: how many, `seconds`: of training, their median; `kind`: what that shows, as `Verdict` has it, of the arm."""

    arm: str
    runs: int
    value: Interval
    seconds: float
    gain: Interval | None = None
    kind: str = ""


def interval(numbers: Sequence[float]) -> Interval:
    """Mean ± t(n-1) · sd / sqrt(n)."""
    mean, count = statistics.fmean(numbers), len(numbers)
    if count < 2 or not all(map(math.isfinite, numbers)):
        return Interval(mean, None)
    return Interval(mean, _t(count) * statistics.stdev(numbers) / math.sqrt(count))


def _t(count: int) -> float:
    return _T[min(count - 1, len(_T)) - 1]


def averaged(runs: Sequence[Run]) -> list[Run]:
    """A run for each arm and draw, in their order: the mean over its seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.arm, []).append(run)
    return [
        replace(own[0], value=statistics.fmean(r.value for r in own), seconds=statistics.fmean(r.seconds for r in own))
        for own in groups.values()
    ]


def standings(runs: Sequence[Run], lower: bool) -> list[Standing]:
    """Every arm, the recipe's first. Arms are paired with it by seed: seeds share rows' order, and much of their luck. Of random
    layers the interval is that of draws, each the mean of its seeds, since another draw would give other layers."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    ours = {run.seed: run.value for run in runs if run.arm == runs[0].arm}
    found = []
    for arm, own in groups.items():
        units: dict[object, list[Run]] = {}
        draws = len({run.arm for run in own}) > 1
        for run in own:
            units.setdefault(run.arm if draws else run.seed, []).append(run)
        values = [statistics.fmean(run.value for run in unit) for unit in units.values()]
        gains = [
            statistics.fmean((ours[r.seed] - r.value) * (1 if lower else -1) for r in unit) for unit in units.values()
        ]
        gain = None if arm == runs[0].group else interval(gains)
        seconds = statistics.median(run.seconds for run in own)
        found.append(Standing(arm, len(own), interval(values), seconds, gain, "" if gain is None else _kind(gain)))
    return found


def _kind(gain: Interval) -> str:
    if not gain.margin:  # one number, or no spread to measure by
        return "unknown"
    return "no difference" if abs(gain.mean) <= gain.margin else "better" if gain.mean > 0 else "worse"


def judge(runs: Sequence[Run], lower: bool, what: str) -> Verdict:
    """What the runs show, the first being the recipe's.

    It differs from random choice only where it lies outside the 95 % prediction interval of one more random draw,
    mean ± t(n-1) · sd · sqrt(1 + 1/n): the spread between draws is all that is known about chance here. With several seeds each
    arm and draw counts by its mean over them.
    """
    seeds = len({run.seed for run in runs})
    runs = averaged(runs)
    ours = runs[0]
    draws = [run.value for run in runs if run.arm.startswith("random:")]
    if len(draws) < 2 or statistics.stdev(draws) == 0:
        few = f"all {len(draws)} random draws gave {draws[0]:.4f}, so there is" if len(draws) > 1 else "there is"
        text = f"{HEADS['unknown']}: {few} no spread between draws to measure by (--arms random:3)."
        return Verdict("unknown", text)
    mean, spread = statistics.fmean(draws), statistics.stdev(draws)
    gain = mean - ours.value if lower else ours.value - mean
    margin = _t(len(draws)) * spread * math.sqrt(1 + 1 / len(draws))
    facts = f"{ours.arm} reached a {what} of {ours.value:.4f} and {len(draws)} random draws {mean:.4f} on average"
    facts += f" ({min(draws):.4f} to {max(draws):.4f}); chance alone explains a gap of up to {margin:.4f}"
    kind = "better" if gain > margin else "worse" if gain < -margin else "no difference"
    rests = "one run" if seeds == 1 else f"{seeds} seeds"
    alone = f", and all this rests on {rests} over one set of rows" if kind == "better" else ""
    beside = _beside(runs, ours, margin, lower) if seeds == 1 else ""  # several seeds tell more of them, in pairs
    return Verdict(kind, f"{HEADS[kind]}: {facts}{alone}{beside}.")


def _beside(runs: Sequence[Run], ours: Run, margin: float, lower: bool) -> str:
    """How the choice by place did, as a clause: it costs nothing to make."""
    parts = []
    for run in runs[1:]:
        if run.arm in ("last", "first"):
            gain = (run.value - ours.value) if lower else (ours.value - run.value)
            how = "no clear difference" if abs(gain) <= margin else "clearly worse" if gain > 0 else "clearly better"
            count = "as many" if len(run.layers) == len(ours.layers) else f"{len(run.layers)}"
            parts.append(f"; {count} layers from the {'end' if run.arm == 'last' else 'start'}: {run.value:.4f}, {how}")
    return "".join(parts)


def judge_arms(found: Sequence[Standing], seeds: int) -> Verdict:
    """What is said of arms that train otherwise, each beside the recipe's: two are told apart where the 95 % interval of their mean
    difference, seed by seed, does not hold 0."""
    ours, *others = found
    if seeds < 2:
        text = "one training seed says nothing of how much of a difference is chance (--seeds 3)"
        return Verdict("unknown", f"Nothing can be said about the arms: {text}.")
    parts = [f"{s.arm} {_told(s)}" for s in others]
    kinds = {s.kind for s in others}
    kind = "worse" if "better" in kinds else "better" if kinds == {"worse"} else "no difference"
    head = {
        "worse": f"{_names(others, 'better')} did better than {ours.arm} here",
        "better": f"{ours.arm} did better than every other arm here",
        "no difference": f"No arm was better than {ours.arm}, as far as {seeds} seeds tell",
    }[kind]
    each = "; each at 95 % by itself, so that of twenty such comparisons about one is wrong" if len(others) > 2 else ""
    return Verdict(
        kind, f"{head} ({ours.arm} {ours.value}): {'; '.join(parts)}{each}. {seeds} seeds over one set of rows."
    )


def _told(one: Standing) -> str:
    gain = one.gain
    if gain is None or one.kind == "unknown":
        return f"{one.value.mean:.4f}, of which nothing can be said"
    by = f"{abs(gain.mean):.4f} ± {gain.margin:.4f}"
    if one.kind == "no difference":
        return f"{one.value.mean:.4f}, not told apart from chance (by {by})"
    return f"{one.value.mean:.4f}, {one.kind} by {by}"


def _names(found: Sequence[Standing], kind: str) -> str:
    return " and ".join(s.arm for s in found if s.kind == kind)
