"""Whether a run has learned anything, told by its losses; and what to do about it where it has not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from layerpeft.recipe.recipe import Recipe, command_of
from layerpeft.text import measured

MOVES = 0.01  # of a loss: less is none that anybody would notice
LOSS = "eval_loss"
FASTER, LONGER = 3, 3


def unlearned(
    recipe: Recipe,
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    steps: int,
) -> str | None:
    """What to say of a run whose held-out loss did not fall, or without held-out rows whose training loss did not: the likeliest
    cause, and the command that tries its cure. None where it fell, where nothing tells, and of trainers whose loss is no measure.

    `history`: what the trainer logged; `steps`: that it made."""
    if recipe.row.writes:
        return None
    losses = [float(line["loss"]) for line in history if "loss" in line]
    trained = _moved(losses[0], fmean(losses[-max(1, len(losses) // 4) :])) if len(losses) > 1 else None
    held = _moved(before[LOSS], after[LOSS]) if LOSS in before and LOSS in after else None
    if held is None and trained is None or (held if held is not None else trained) == "fell":
        return None
    what = (
        _told("held-out", "before", before[LOSS], "after", after[LOSS])
        if held is not None
        else _told("training", "at first", losses[0], "at last", losses[-1])
    )
    cause, changed = _cure(recipe, trained, held, steps)
    again = {"output_dir": f"{recipe.output_dir}-again", **changed}
    return f"nothing was learned that shows: {what}. {cause}:\n  {command_of(recipe, again)}"


def _told(which: str, then: str, first: float, now: str, last: float) -> str:
    shown = [measured(value) for value in (first, last)]
    fell = "hardly fell" if last < first and shown[0] != shown[1] else "did not fall"
    return f"the {which} loss {fell} ({shown[0]} {then}, {shown[1]} {now})"


def _moved(first: float, last: float) -> str:
    """ "fell", "rose" or "stayed"."""
    if not math.isfinite(last):
        return "rose"
    least = MOVES * max(abs(first), 1e-3)
    return "fell" if last < first - least else "rose" if last > first + least else "stayed"


def _cure(recipe: Recipe, trained: str | None, held: str | None, steps: int) -> tuple[str, dict[str, Any]]:
    """The likeliest cause as a sentence, and the settings that do something about it."""
    rate = recipe["learning_rate"]
    slower, faster = ({"learning_rate": float(f"{rate * by:.2g}")} for by in (1 / FASTER, FASTER))
    if trained == "rose" or trained is None and held == "rose":
        return f"The loss rose: the learning rate ({rate:g}) is likely too high", slower
    if trained == "fell":
        fewer = _length(recipe, 1 / LONGER, steps)
        return (
            f"The training loss fell: these {steps} steps were learned by heart. Fewer of them, slower, and more rows help",
            slower | fewer,
        )
    return (
        f"{steps} steps at a learning rate of {rate:g} are likely too few, or too small",
        faster | _length(recipe, LONGER, steps),
    )


def _length(recipe: Recipe, by: float, steps: int) -> dict[str, Any]:
    """A training that is as many times as long."""
    if recipe["max_steps"] > 0:
        return {"max_steps": max(1, round(steps * by))}
    return {"num_train_epochs": float(f"{max(0.1, recipe['num_train_epochs'] * by):.2g}")}
