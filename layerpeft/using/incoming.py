"""Rows on their way to a model: read one after the other, each with what it lacks, none of them kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerpeft.errors import Problem, Problems, RecipeError, UsageError
from layerpeft.recipe.reading import Broken
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source, column_problems, lacking, load, local_files
from layerpeft.recipe.tasks.shape import How, cells, problems_of, undecoded
from layerpeft.recipe.tasks.task import Known
from layerpeft.recipe.templates import as_flags, suited, template_columns
from layerpeft.recipe.trainers.table import task_of


@dataclass(frozen=True)
class Given:
    """A row: its number from 1, where it stands, its cells, and why it cannot be read ("" where it can)."""

    number: int
    where: str
    row: Mapping[str, Any]
    reason: str = ""


@dataclass(frozen=True)
class Incoming:
    """Rows, and which of their columns are read: `how` makes a row's cells by the names of a form."""

    source: Source
    how: How

    @property
    def homes(self) -> tuple[str, ...]:
        return self.how.known.homes

    def cells(self, given: Given) -> dict[str, Any]:
        """Raises: Unfit where there is nothing to fill a template with."""
        return cells(given.row, self.how)

    def __iter__(self) -> Iterator[Given]:
        """Raises: RecipeError where a file goes on in a way that cannot be read."""
        if not self.source.files:
            for place, row in self.source:
                yield Given(place.number, place.where, row)
            return
        total = 0
        for path in self.source.files:
            for line, row in self.source.read(path):
                total += 1
                where = f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {line}"
                if not isinstance(row, Broken):
                    yield Given(total, where, row)
                elif row.ends:
                    raise RecipeError(f"{where}: {row.text}")
                else:
                    yield Given(total, where, {}, row.text)


def source_of(name: str, split: str, by: str | None = None) -> Source:
    """Rows of files, or of a folder or data set of the hub, none of which is held; `by`: what a row of plain text is.

    Raises: RecipeError."""
    files = local_files(name)
    if files is not None:
        source: Any = Source(name, split, tuple(files), by=by if files[0].suffix == ".txt" else None)
    else:
        source = load(name, config=None, split=split, by=by)
    assert source is not None
    return undecoded(replace(source, held=None))


def incoming(
    rows: str, split: str, trainer: str, forms: Sequence[tuple[str, ...]], more: Sequence[str],
    columns: Mapping[str, str] | None, by: str | None = None,
) -> Incoming:  # fmt: skip
    """Rows of files, or of a folder or data set of the hub, read by the first of the forms whose columns are there.

    `columns`: templates of training, which count where the rows have what they name. Raises: RecipeError.
    """
    source = source_of(rows, split, by)
    have = source.columns
    task: Any = task_of(trainer) or task_of("dpo")  # of which nothing but the way of reading cells is wanted
    homes = tuple(dict.fromkeys(str(path.parent) for path in source.files))
    usable = {k: t for k, t in (columns or {}).items() if set(template_columns(t)) <= set(have)}
    for form in forms:
        if set(form) <= set(usable):
            kept = {k: usable[k] for k in (*form, *more) if k in usable}
            return Incoming(source, How(task, tuple(kept.items()), (), Known((), homes)))
    for form in forms:
        if set(form) <= set(have):
            names = (*form, *(n for n in more if n in have))
            declared = tuple((n, found) for n in names if (found := source.classes(n)))
            return Incoming(source, How(task, (), names, Known(declared, homes)))
    wanted = "; or ".join(" and ".join(f"`{n}`" for n in form) for form in forms)
    example = {name: f"{{{name}}}" for name in forms[0]}
    raise RecipeError(Problem(("columns",), f"{rows}: {lacking(wanted, have, example, as_flags)}"))


def check_learned(rows: str, recipe: Recipe, task: Any, have: list[str], columns: Mapping[str, str] | None) -> None:
    """Whether a loss can be taken of rows with the columns `have`; what is said names them in the templates that were trained.

    `task`: of the trainer that takes it, None for that of text. Raises: RecipeError."""
    own = recipe.values.get("columns")

    def say(example: Mapping[str, str]) -> str:
        return as_flags(suited(own, have) if own else example)

    field = recipe["dataset_text_field"] if task is None else None
    told = column_problems("sft", have, columns, field, say) if task is None else problems_of(task, have, columns, say)
    problems = Problems(rows)
    for name, sentence in told:
        problems.add(f"--column {name}: {sentence}" if name else sentence, "columns")
    problems.raise_if_any(RecipeError)


def templates(words: Sequence[str]) -> dict[str, str]:
    """`--column text='{sentence}'`, as templates by name. Raises: UsageError."""
    found = {}
    for word in words:
        name, equals, template = word.partition("=")
        try:
            named = template_columns(template)
        except ValueError as error:
            raise UsageError(f"--column {word!r}: {error}") from error
        if not equals or not named:
            raise UsageError(f"--column {word!r}: expected NAME='{{column}}', as text='{{sentence}}'")
        found[name.strip()] = template
    return found
