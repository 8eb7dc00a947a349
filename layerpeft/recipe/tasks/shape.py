"""Rows of a task as a `datasets.Dataset`: one look at each, in which everything that does not fit is found."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from layerpeft.errors import Problems, RecipeError
from layerpeft.recipe.rows import (
    Making,
    Source,
    Unfit,
    dataset,
    fill,
    lacking,
    template_problems,
)
from layerpeft.recipe.tasks.task import Known, Task
from layerpeft.recipe.templates import Say, in_recipe, template_columns

WAYS = {str: "text", list: "a list", float: "a number"}


@dataclass(frozen=True)
class How:
    """What becomes of a row: `columns`, templates by name; without them columns are read by the names of `kept`."""

    task: Task
    columns: tuple[tuple[str, str], ...]
    kept: tuple[str, ...]
    known: Known = Known()


def form_of(task: Task, have: list[str]) -> tuple[str, ...]:
    """The first form of which all columns are there; empty without one."""
    return next((form for form in task.forms if set(form) <= set(have)), ())


def problems_of(
    task: Task, have: list[str], columns: Mapping[str, str] | None, say: Say = in_recipe
) -> list[tuple[str, str]]:
    """What keeps rows with the columns `have` from being trained on: the template at fault ("" for none), and a sentence.
    `say`: how templates are written where that is read."""
    if not have:
        return []  # nothing could be read of them, and that is said elsewhere
    if columns:
        return template_problems(have, columns)
    if form_of(task, have):
        return []
    smallest = [form for form in task.forms if not any(set(other) < set(form) for other in task.forms)]
    wanted = "; or ".join(" and ".join(f"`{name}`" for name in form) for form in smallest)
    return [("", lacking(wanted, have, task.example, say))]


def shape(source: Source, task: Task, columns: Mapping[str, str] | None, most: int | None = None) -> Any:
    """A `datasets.Dataset` of the rows (the first `most`), as the task has them.

    Raises: RecipeError when a column is missing, or naming the first rows that cannot be trained on.
    """
    have = source.columns
    problems = Problems("data")
    for name, sentence in problems_of(task, have, columns):
        problems.add(f"columns.{name}: {sentence}" if name else sentence)
    problems.raise_if_any(RecipeError)
    kept = (*form_of(task, have) * (not columns), *(name for name in task.more if name in have))
    if task.others:
        kept = tuple(dict.fromkeys((*kept, *(name for name in have if name not in (columns or {})))))
    named = {name: source.classes(name) for name in kept} if not columns else {}
    homes = tuple(dict.fromkeys(str(path.parent) for path in source.files))
    how = How(task, tuple((columns or {}).items()), kept, Known(tuple((k, v) for k, v in named.items() if v), homes))

    def feature(name: str, value: Any) -> Any:
        return _feature(task.types.get(name, task.others or "text"), value)

    return dataset(undecoded(source), Making(_made, how, WAYS), dict(how.columns) or kept, feature, most)


def undecoded(source: Source) -> Source:
    """With pictures and sounds as the files that they are."""
    import datasets

    data = source.data
    if data is None:
        return source
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            data = data.cast_column(name, type(feature)(decode=False))
    return replace(source, data=data)


def _feature(kind: str, value: Any) -> Any:
    import datasets

    if kind in ("file", "files"):
        one = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        return datasets.List(one) if kind == "files" else one
    if kind in ("said", "any") and not isinstance(value, str):
        return datasets.Json()  # each with the keys and types that it has
    plain = {"text": "string", "number": "float64", "count": "int64", "flag": "bool"}
    inside = datasets.Value(plain.get(kind.removesuffix("s"), "string"))
    return datasets.List(inside) if kind.endswith("s") or isinstance(value, list) else inside


def _made(row: Mapping[str, Any], how: How) -> dict[str, Any]:
    return how.task.row(cells(row, how), how.known)


def cells(row: Mapping[str, Any], how: How) -> dict[str, Any]:
    """The cells of a row by the task's names: of a template that is one column the cell itself, of any other its text.

    Raises: Unfit where there is nothing to fill a template with."""
    if not how.columns:
        return {name: row.get(name) for name in how.kept}
    rest = {name: row.get(name) for name in how.kept} if how.task.others else {}
    return rest | {name: _filled(name, template, row) for name, template in how.columns}


def _filled(name: str, template: str, row: Mapping[str, Any]) -> Any:
    named = template_columns(template)
    literal = "".join(text for text, *_ in string.Formatter().parse(template))
    if len(named) == 1 and not literal:
        return row.get(named[0])
    if named and not literal.strip() and all(row.get(column) is None for column in named):
        return None
    try:
        return fill(template, {column: row.get(column) for column in named})
    except ValueError as error:
        raise Unfit(f"has no text for {name}: {error}") from None
