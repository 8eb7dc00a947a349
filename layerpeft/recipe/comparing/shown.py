"""A comparison as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerpeft.integrations.drawing import new_figure, write_figure
from layerpeft.recipe.comparing.budgets import Budget, Given, Left
from layerpeft.recipe.comparing.names import group_of, is_draw, label_of
from layerpeft.recipe.comparing.runs import Run
from layerpeft.recipe.comparing.verdict import Basis, Standing, Verdict, averaged, headline
from layerpeft.recipe.tasks.metrics import NAMES
from layerpeft.text import grid, measured, size_text


@dataclass(frozen=True)
class Comparison:
    """All runs (the recipe's first), the number they are compared by, its value before training, the verdict, and its basis.

    Where arms have a budget, train otherwise or have several seeds, also: what each was given (by arm, each draw by itself), how
    arms stand over their seeds, those that were left out, and `arms`: the verdict on them.
    """

    measure: str
    before: float
    runs: tuple[Run, ...]
    verdict: Verdict
    num_layers: int
    unit: str = "layer"
    basis: Basis = Basis()
    budget: Budget | None = None
    room: float | None = None
    given: Mapping[str, Given] = field(default_factory=dict)
    standings: tuple[Standing, ...] = ()
    left_out: tuple[Left, ...] = ()
    arms: Verdict | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        more = ("budget", "room", "given", "standings", "left_out", "arms") if self.arms is None else ()
        return {k: v for k, v in plain.items() if k not in more and (k != "unit" or v != "layer")}


def table(found: Comparison) -> str:
    """One line per arm and draw, and one for the random draws together."""
    name = NAMES[found.measure]
    heads = ("arm", f"{found.unit}s", "trainable", name, _clock(found))
    rows: list[tuple[str, ...]] = [heads, ("before training", "", "", measured(found.before), "")]
    for run in averaged(found.runs):
        layers = _shown(run, found)
        rows.append((label_of(run.arm), layers, f"{run.trainable:,}", measured(run.value), f"{run.seconds:.0f}"))
    draws = [run.value for run in averaged(found.runs) if is_draw(run.arm)]
    if len(draws) > 1:
        spread = f"  {measured(min(draws))} to {measured(max(draws))}, sd {measured(statistics.stdev(draws))}"
        rows.append(("random, mean", "", "", measured(statistics.fmean(draws)), spread))
    return "\n".join(grid(rows, "<<>", (16, 22, 11, 14, 8), " "))


def arms_table(found: Comparison) -> str:
    """One line per arm: what it was given, how much of the budget that is, its number with the 95 % interval, how much better than
    the recipe's it is, and what it took."""
    heads = ["arm", f"{found.unit}s", "rank", "steps", "rate", "trainable", "bytes", "operations", "of budget"]
    heads += [NAMES[found.measure], "gain", _clock(found)]
    rows = [heads]
    for standing in found.standings:
        given = [g for arm, g in found.given.items() if group_of(arm) == standing.arm]
        steps = [run.steps for run in found.runs if run.group == standing.arm]
        rows.append(
            [
                standing.title,
                _of([g.count for g in given]),
                _of([g.rank for g in given]),
                _of(steps),
                _of([run.rate for run in found.runs if run.group == standing.arm]),
                _of([g.parameters for g in given]),
                size_text(statistics.fmean(g.peak_bytes for g in given)),
                _of([g.operations for g in given], "{:.3g}"),
                _of([None if g.share is None else 100 * g.share for g in given], "{:.0f} %"),
                str(standing.value),
                "" if standing.gain is None else str(Signed(standing)),
                f"{standing.seconds:.1f}",
            ]
        )
    lines = grid(rows, "<>")
    return "\n".join([*lines, *(f"left out: {one.arm}: {one.why}" for one in found.left_out)])


def _clock(found: Comparison) -> str:
    """What seconds of training are of."""
    return "processor s" if all(run.processor for run in found.runs) else "seconds"


@dataclass(frozen=True)
class Signed:
    """How much better an arm is, with what it shows."""

    standing: Standing

    def __str__(self) -> str:
        gain = self.standing.gain
        assert gain is not None
        margin = "" if gain.margin is None else f" ± {measured(gain.margin)}"
        mark = {"better": " *", "worse": " *"}.get(self.standing.kind, "  ")
        return f"{'' if gain.mean < 0 else '+'}{measured(gain.mean)}{margin}{mark}"


def _of(numbers: Sequence[Any], form: str = "{:,}") -> str:
    """One number, or the range of several."""
    known = sorted({n for n in numbers if n is not None})
    if not known:
        return "-"
    texts = list(dict.fromkeys(form.format(n) for n in (known[0], known[-1])))
    return " to ".join(texts)


def numbers(layers: Sequence[int], count: int) -> str:
    """Layer numbers as a reader wants them: "0, 10, 11", "0-11", shortened where there are many."""
    if list(layers) == list(range(count)):
        return f"0-{count - 1}"
    text = ", ".join(map(str, layers))
    return text if len(text) <= 22 else f"{text[:12]}... ({len(layers)})"


def _shown(run: Run, found: Comparison) -> str:
    return numbers(run.layers, found.num_layers)


def draw(found: Comparison, path: Path) -> None:
    """One row per arm, one dot per run, the random draws with their mean; with a budget, other methods or seeds also the number
    against seconds of training and bytes of a step, each with its 95 % interval."""
    wide = bool(found.given)
    figure = new_figure(17 if wide else 8, 1.6 + max(0.5 * len(_groups(found)), 3.2 if wide else 0))
    if figure is None:
        return
    axes = figure.subplots(1, 3 if wide else 1, squeeze=False)[0]
    _dots(axes[0], found)
    if wide:
        _against(axes[1], found, "seconds of training", lambda standing: standing.seconds)
        _against(axes[2], found, "MiB at the peak of a step, as planned", lambda standing: _peak(found, standing))
    write_figure(figure, path, dpi=120)


def labels(found: Comparison) -> list[str]:
    """What stands beside the dots of each arm: its name, and which layers."""
    return [f"{arm}\n{_place(found, arm, runs)}" for arm, runs in _groups(found).items()]


def _groups(found: Comparison) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in found.runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def _place(found: Comparison, arm: str, runs: Sequence[Run]) -> str:
    layers, given = runs[0].layers, found.given.get(arm)
    if given is not None and given.count is not None and given.count < len(layers):
        return f"{given.count} of {len(layers)} {found.unit}s at a time"
    if not is_draw(runs[0].arm):
        return numbers(layers, found.num_layers)
    if (draws := len({run.arm for run in runs})) == 1:
        return f"one draw: {numbers(layers, found.num_layers)}"
    each = _of([len(run.layers) for run in runs])
    return f"{draws} draws of {each} {found.unit}{'' if each == '1' else 's'}"


def _dots(axes: Any, found: Comparison) -> None:
    for place, runs in enumerate(_groups(found).values()):
        values = [run.value for run in runs]
        axes.plot(values, [place] * len(values), "o", color=_colour(place, found), markersize=8, alpha=0.85)
        if len(values) > 1:
            axes.plot(
                [statistics.fmean(values)] * 2, [place - 0.28, place + 0.28], color=_colour(place, found), linewidth=2
            )
    beside = labels(found)
    ours = statistics.fmean(run.value for run in found.runs if run.arm == found.runs[0].arm)
    axes.axvline(ours, color=_colour(0, found), linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(beside)), beside)
    axes.set_ylim(len(beside) - 0.5, -0.5)
    axes.set_xlabel(_measure(found, f"; {found.before:.3f} before"))
    if found.arms is None:
        axes.set_title(f"{headline(found.verdict.kind, found.basis)} ({found.runs[0].arm} against other choices)")
    else:
        equal = f"equal {found.budget.kind}" if found.budget is not None else "no equal budget"
        axes.set_title(f"{equal}, {len({run.seed for run in found.runs})} training seeds")
    axes.grid(axis="x", alpha=0.3)


def _peak(found: Comparison, standing: Standing) -> float:
    """MiB, the mean over an arm's draws."""
    given = [g for arm, g in found.given.items() if group_of(arm) == standing.arm]
    return statistics.fmean(g.peak_bytes for g in given) / 2**20


def _against(axes: Any, found: Comparison, what: str, takes: Callable[[Standing], float]) -> None:
    for place, standing in enumerate(found.standings):
        taken = takes(standing)
        if math.isfinite(standing.value.mean):
            error = {"yerr": standing.value.margin or 0, "capsize": 3, "elinewidth": 0.9}
            axes.errorbar(taken, standing.value.mean, fmt="o", color=_colour(place, found), label=standing.arm, **error)
    axes.margins(x=0.1)
    axes.legend(fontsize=8, framealpha=0.6)
    axes.set_xlabel(what)
    axes.set_ylabel(_measure(found, ", 95 % interval"))
    axes.grid(alpha=0.3)


def _colour(place: int, found: Comparison) -> str:
    """Of an arm: its own where there are several pictures of it, otherwise one for the recipe's and one for all others."""
    return f"C{place}" if found.given else "C1" if place == 0 else "C0"


def _measure(found: Comparison, more: str) -> str:
    better = "lower" if found.measure == "eval_loss" else "higher"
    return f"{NAMES[found.measure]} after training ({better} is better{more})"
