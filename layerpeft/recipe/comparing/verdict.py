"""What runs show, and what chance alone would: against random choices of layers, and against other arms, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerpeft.recipe.comparing.names import is_draw
from layerpeft.recipe.comparing.runs import Run
from layerpeft.text import measured

# two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; the last one serves beyond (a little too careful)
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LEAST = 7  # held-out rows: of fewer, t(n-1) · sd / sqrt(n) is more than sd, so that a mean says less of others than one row does
FEW = 100  # held-out rows: of fewer, one row moves a mean over them by more than a hundredth of its own number
HEADS = {
    "better": "Better than random",
    "no difference": "No difference shown",
    "worse": "Random was better",
    "unknown": "Nothing can be said about the choice",
}


@dataclass(frozen=True)
class Basis:
    """What a comparison rests on: training seeds, held-out rows (None: nobody counted them), whether learning rates were chosen on
    those rows too, and how many of them train as well (None: nobody looked). As a text: the sentence that says so, and what limits
    it."""

    seeds: int = 1
    rows: int | None = None
    tuned: bool = False
    trained: int | None = None

    @property
    def few(self) -> bool:
        """Whether the rows are too few to stand for others."""
        return self.rows is not None and self.rows < FEW

    @property
    def scant(self) -> bool:
        """Whether there are so few rows that nothing is judged by them."""
        return self.rows is not None and self.rows < LEAST

    @property
    def shown(self) -> str:
        """The rows, in words."""
        if self.rows is None:
            return "one set of rows"
        return "one held-out row" if self.rows == 1 else f"{self.rows:,} held-out rows"

    @property
    def here(self) -> str:
        """Where a finding holds, as the end of its clause."""
        limited = self.few or bool(self.rows and self.trained)
        return f"on {'this ' if self.rows == 1 else 'these '}{self.shown}" if limited else "here"

    def __str__(self) -> str:
        seeds = "One training seed" if self.seeds == 1 else f"{self.seeds} seeds"
        text = f"{seeds} over {self.shown}"
        text += " that rates were chosen by as well" if self.tuned else ""
        text += f", {self.trained:,} of which train{'s' * (self.trained == 1)} as well" if self.trained else ""
        limit = ", too few to judge by" if self.scant else ", too few to say much of others" if self.few else ""
        return f"{text}{limit}."


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
        return measured(self.mean) + (f" ± {measured(self.margin)}" if self.margin is not None else "")


@dataclass(frozen=True)
class Standing:
    """An arm over its runs: its number, and how much better it is than the recipe's arm (`gain`, above 0: better), seed by seed.
    `runs`: how many, `seconds`: of training, their median; `kind`: what that shows, as `Verdict` has it, of the arm; `draws`: of
    random layers, where it is those."""

    arm: str
    runs: int
    value: Interval
    seconds: float
    gain: Interval | None = None
    kind: str = ""
    draws: int = 0

    @property
    def title(self) -> str:
        """The arm, with how many draws stand for all that there could be."""
        return (
            self.arm if not self.draws else f"{self.arm} ({'one draw' if self.draws == 1 else f'{self.draws} draws'})"
        )


def interval(numbers: Sequence[float], *, more: bool = False) -> Interval:
    """Mean ± t(n-1) · sd / sqrt(n); where one `more` number is to lie within it, mean ± t(n-1) · sd · sqrt(1 + 1/n)."""
    mean, count = statistics.fmean(numbers), len(numbers)
    if count < 2 or not all(map(math.isfinite, numbers)):
        return Interval(mean, None)
    return Interval(mean, _t(count) * statistics.stdev(numbers) * math.sqrt(1 / count + more))


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


def standings(runs: Sequence[Run], lower: bool, scant: bool = False) -> list[Standing]:
    """Every arm, the recipe's first. Arms are paired with it by seed: seeds share rows' order, and much of their luck. Of several
    draws of random layers each counts by its mean over the seeds, and the recipe's arm is told apart from them as `judge` does it:
    where it lies outside of what one more draw would give. `scant`: on so few rows nothing is told apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    ours = {run.seed: run.value for run in runs if run.arm == runs[0].arm}
    found = []
    for arm, own in groups.items():
        units: dict[object, list[Run]] = {}
        draws = len({run.arm for run in own if is_draw(run.arm)})
        for run in own:
            units.setdefault(run.arm if draws > 1 else run.seed, []).append(run)
        values = [statistics.fmean(run.value for run in unit) for unit in units.values()]
        gains = [
            statistics.fmean((ours[r.seed] - r.value) * (1 if lower else -1) for r in unit) for unit in units.values()
        ]
        gain = None if arm == runs[0].group else interval(gains, more=draws > 1)
        kind = "" if gain is None else "unknown" if scant else _kind(gain)
        seconds = statistics.median(run.seconds for run in own)
        found.append(Standing(arm, len(own), interval(values), seconds, gain, kind, draws))
    return found


def _kind(gain: Interval) -> str:
    if gain.margin == gain.mean == 0:  # the same under every seed
        return "no difference"
    if not gain.margin:  # one number, or no spread to measure by
        return "unknown"
    return "no difference" if abs(gain.mean) <= gain.margin else "better" if gain.mean > 0 else "worse"


def judge(runs: Sequence[Run], lower: bool, what: str, basis: Basis = Basis(), alone: bool = True) -> Verdict:
    """What the runs show of the choice of layers, the first being the recipe's; with `alone` also what the other arms came to,
    where nothing else says it.

    It differs from random choice only where it lies outside the 95 % prediction interval of one more random draw,
    mean ± t(n-1) · sd · sqrt(1 + 1/n): the spread between draws is all that is known about chance here. With several seeds each
    arm and draw counts by its mean over them.
    """
    runs = averaged(runs)
    ours, draws = runs[0], [run.value for run in runs if is_draw(run.arm)]
    beside = _beside(runs, lower) if alone and basis.seeds == 1 else ""
    if why := _unjudged(ours.value, draws):
        return Verdict("unknown", f"{HEADS['unknown']}: {why}{beside}. {basis}")
    chance = interval(draws, more=True)
    gain, margin = (chance.mean - ours.value) * (1 if lower else -1), chance.margin or math.inf
    shown = [measured(value) for value in (ours.value, chance.mean, min(draws), max(draws), margin)]
    reached = f"a {what} of {shown[0]}" if lower else f"{shown[0]} ({what})"
    facts = f"{ours.arm} reached {reached} and {len(draws)} random draws {shown[1]} on average"
    facts += f" ({shown[2]} to {shown[3]}); chance alone explains a gap of up to {shown[4]}"
    kind = "better" if gain > margin else "worse" if gain < -margin else "no difference"
    kind = "unknown" if basis.scant else kind
    return Verdict(kind, f"{headline(kind, basis)}: {facts}{beside}. {basis}")


def headline(kind: str, basis: Basis) -> str:
    """A verdict on a choice in a few words; what was found holds where it was found."""
    return f"{HEADS[kind]} {basis.here}" if kind in ("better", "worse") else HEADS[kind]


def _unjudged(ours: float, draws: Sequence[float]) -> str:
    """Why nothing can be said of a choice beside random ones; empty where something can."""
    if len(draws) < 2:
        return "there is no spread between draws to measure by (--arms random:3)"
    if not all(map(math.isfinite, (ours, *draws))):
        lost = sum(not math.isfinite(value) for value in draws)
        whose = f"{lost} of {len(draws)} random draws" if math.isfinite(ours) else "the recipe's arm"
        return f"{whose} came to no finite number"
    if statistics.stdev(draws) == 0:
        gave = measured(draws[0])
        return f"all {len(draws)} random draws gave {gave}, so there is no spread between them to measure by"
    return ""


def _beside(runs: Sequence[Run], lower: bool) -> str:
    """What arms came to that have one run each, as a clause."""
    ours, *others = runs
    found = [f"{run.arm} {_apart(run.value, ours.value, lower)}" for run in others if not is_draw(run.arm)]
    return f"; {', '.join(found)}: {ONE}" if found else ""


def _apart(value: float, ours: float, lower: bool) -> str:
    gain = (ours - value) * (1 if lower else -1)
    if not math.isfinite(gain):
        return measured(value)
    apart = f"{measured(abs(gain))} {'better' if gain > 0 else 'worse'}" if gain else "the same"
    return f"{measured(value)} ({apart})"


ONE = "of one training seed there is no interval, so how much of that is chance is not known (--seeds 3)"


def judge_arms(found: Sequence[Standing], basis: Basis, lower: bool = True) -> Verdict:
    """What is said of arms that train otherwise, each beside the recipe's: two are told apart where the 95 % interval of their mean
    difference, seed by seed, does not hold 0."""
    ours, *others = found
    unknown = "Nothing can be said about the arms"
    if not others:
        return Verdict("unknown", f"{unknown}: none is left beside {ours.arm}.")
    if basis.seeds < 2:
        each = [f"{s.title} {_apart(s.value.mean, ours.value.mean, lower)}" for s in others if s.draws < 2]
        return Verdict("unknown", f"{unknown}: {', '.join([f'{ours.arm} {ours.value}', *each])}; {ONE}. {basis}")
    parts = [f"{s.title} {_told(s)}" for s in others]
    kinds = {s.kind for s in others}
    if kinds == {"unknown"}:
        return Verdict("unknown", f"{unknown} ({ours.arm} {ours.value}): {'; '.join(parts)}. {basis}")
    kind = "worse" if "better" in kinds else "better" if kinds == {"worse"} else "no difference"
    head = {
        "worse": f"{_names(others, 'better')} did better than {ours.arm} {basis.here}",
        "better": f"{ours.arm} did better than every other arm {basis.here}",
        "no difference": f"No arm is shown to be better than {ours.arm} by {basis.seeds} seeds",
    }[kind]
    each_by = (
        "; each at 95 % by itself, so that of twenty such comparisons about one is wrong" if len(others) > 1 else ""
    )
    return Verdict(kind, f"{head} ({ours.arm} {ours.value}): {'; '.join(parts)}{each_by}. {basis}")


def _told(one: Standing) -> str:
    gain, value = one.gain, measured(one.value.mean)
    if gain is None or one.kind == "unknown":
        same = None if gain is None or gain.margin != 0 else measured(abs(gain.mean))
        why = f" (the same difference of {same} in each)" if same else ""
        return f"{value}, of which nothing can be said{why}"
    assert gain.margin is not None, "without a margin nothing can be said"
    if gain.margin == 0:
        return f"{value}, the same under every seed"
    by = f"{measured(abs(gain.mean))} ± {measured(gain.margin)}"
    if one.kind == "no difference":
        return f"{value}, not told apart from chance (by {by})"
    return f"{value}, {one.kind} by {by}"


def _names(found: Sequence[Standing], kind: str) -> str:
    return " and ".join(s.title for s in found if s.kind == kind)
