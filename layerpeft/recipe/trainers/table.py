"""All trainers by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from layerpeft.recipe.tasks.task import Task
from layerpeft.recipe.trainers import tasks
from layerpeft.recipe.trainers.row import Row, named

SFT = Row(
    "sft",
    "trl.SFTTrainer",
    "trl.SFTConfig",
    "AutoModelForCausalLM",
    "CAUSAL_LM",
    trl=True,
    fused_head=True,
    answers=True,
)
ROWS: Mapping[str, Row] = {row.name: row for row in (SFT, *tasks.ROWS)}
DEFAULT = SFT  # by whose settings a recipe is judged that does not say its trainer


def row_of(trainer: str) -> Row:
    """The row of a trainer; the default's of any other name."""
    return ROWS.get(trainer, DEFAULT)


@cache
def task_of(trainer: str) -> Task | None:
    """What the trainer's rows are for; None of rows that TRL reads itself."""
    path = row_of(trainer).data
    return None if path is None else named(path)
