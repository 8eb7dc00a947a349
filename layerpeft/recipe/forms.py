"""What rows are, by their columns, and which trainers take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerpeft.recipe import rows
from layerpeft.recipe.tasks.shape import form_of
from layerpeft.recipe.trainers.table import ROWS, task_of


@dataclass(frozen=True)
class Form:
    """What rows are called that have all of `columns`, and one of `any` where it names some."""

    name: str
    columns: tuple[str, ...]
    any: tuple[str, ...] = ()


FORMS = (
    Form("preference pairs", ("chosen", "rejected")),
    Form("answers that were liked or not", ("label",), ("completion",)),
    Form("prompts and completions", ("prompt", "completion")),
    Form("conversations", (), rows.TURNS),
    Form("Alpaca rows", rows.ALPACA),
    Form("pictures with labels", ("image", "label")),
    Form("sounds and what is said in them", ("audio", "text")),
    Form("pairs of texts", ("anchor", "positive")),
    Form("pairs of sentences", ("sentence1", "sentence2"), ("score", "label")),
    Form("texts with labels", ("text", "label")),
    Form("texts", ("text",)),
    Form("prompts", ("prompt",)),
)


def form(have: Iterable[str]) -> Form | None:
    """The form of rows with these columns; None where it has no name."""
    there = set(have)
    return next((f for f in FORMS if set(f.columns) <= there and (not f.any or there & set(f.any))), None)


def read_by(trainer: str, have: Iterable[str], text_field: str = "text", sees: bool = False) -> tuple[str, ...]:
    """The columns that a trainer takes rows with these by; none where it does not. `sees`: its model reads pictures."""
    task = task_of(trainer, sees)
    if task is not None:
        return form_of(task, list(have))
    return next((f for f in rows.forms(text_field) if set(f) <= set(have)), ())


def other_trainer(have: list[str]) -> str:
    """To stand behind what a trainer lacks: what there is, and who takes it; nothing where that has no name."""
    found = form(have)
    if found is None:
        return ""
    needed = {*found.columns, *(name for name in found.any if name in have)}
    names = [name for name in ROWS if needed <= set(read_by(name, have))]
    return f"; they are {found.name}, which trainer: {', '.join(names)} takes as they are" if names else ""


def taken(
    trainer: str,
    have: list[str],
    columns: Mapping[str, str] | None,
    text_field: str | None = None,
    sees: bool = False,
) -> str:
    """One line: what is read as what, and which columns are not read."""
    if columns:
        return ""
    task, read = task_of(trainer, sees), read_by(trainer, have, text_field or "text", sees)
    beside = task.more if task is not None else rows.MAY if read == rows.ALPACA else rows.BESIDE
    if not read:
        return ""
    used = dict.fromkeys((*read, *(name for name in beside if name in have)))
    called = form(read)
    what = f"{called.name} ({', '.join(used)})" if called else f"rows with {', '.join(used)}"
    if read == rows.ALPACA:
        what = "Alpaca rows (instruction and input are the prompt, output is the answer)"
    rest = [name for name in have if name not in used] if task is None or not task.others else []
    return f"read as {what}" + (f"; not read: {', '.join(rest[:8])}{' …' if len(rest) > 8 else ''}" if rest else "")
