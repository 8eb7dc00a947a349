"""All trainers by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

from layerpeft.recipe.tasks.task import Task
from layerpeft.recipe.trainers import tasks, trl
from layerpeft.recipe.trainers.row import Row, has, named

ROWS: Mapping[str, Row] = {row.name: row for row in (trl.SFT, *tasks.ROWS, *trl.ROWS)}
DEFAULT = trl.SFT  # by whose settings a recipe is judged that does not say its trainer


def row_of(trainer: str, sees: bool = False) -> Row:
    """The row of a trainer, of its kind for pictures where rows have such and the model `sees`; the default's of any other name."""
    return tasks.SEEING if sees and trainer == tasks.SEEING.name else ROWS.get(trainer, DEFAULT)


@cache
def task_of(trainer: str, sees: bool = False) -> Task | None:
    """What the trainer's rows are for; None of rows that TRL reads itself."""
    path = row_of(trainer, sees).data
    return None if path is None else named(path)


def absent(row: Row) -> str | None:
    """What to say of a trainer whose library is not there, or does not have it; None where it is there."""
    if _is_there(row):
        return None
    library = row.trainer.partition(".")[0]
    if row.package and not find_spec(row.package):
        return f"{row.name} needs a package that is not installed (pip install 'layerpeft[{row.name}]')"
    there = ", ".join(name for name, other in ROWS.items() if _is_there(other))
    return f"{row.name} is not in the {library} that is installed ({version(library)} has no {row.trainer}); there are {there}"


def _is_there(row: Row) -> bool:
    if row.package and not find_spec(row.package):
        return False
    try:
        return all(has(path) for path in (row.trainer, row.arguments))
    except ImportError:
        return False
