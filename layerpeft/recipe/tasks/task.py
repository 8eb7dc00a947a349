"""What a task is made of, from the columns of its rows to the numbers by which a model is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from layerpeft.recipe.rows import Source
from layerpeft.recipe.tokens import Tally


@dataclass(frozen=True)
class Head:
    """What rows say of a model's head: names of its classes, by number; what else its config has to say (`values`); and what
    whoever predicts with it has to know besides (`about`, plain data)."""

    labels: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What is known of all rows: the names that columns `declared` for their numbers, and the folders in which the rows lie."""

    declared: tuple[tuple[str, tuple[str, ...]], ...] = ()
    homes: tuple[str, ...] = ()

    def classes(self, column: str) -> tuple[str, ...]:
        """The names that a column declares; none where it does not."""
        return dict(self.declared).get(column, ())


@dataclass(frozen=True)
class Part:
    """Rows of one kind on their way: `key` of the recipe names them, `source` says where each stands, `processing` turns text,
    pictures or sounds into what the model reads, `head` is what the training rows say."""

    recipe: Any
    key: str
    source: Source
    processing: Any
    head: Head


@runtime_checkable
class Follows(Protocol):
    """A collator that goes by where its trainer stands."""

    def follow(self, trainer: Any) -> None: ...


@dataclass(frozen=True)
class Task:
    """How rows become what a trainer reads.

    `forms`: columns that are enough, each tuple a complete set; `more`: columns that are read besides, where they are there;
    `example`: of templates. `row`: one row's cells, by these names, as what it holds (raises: Unfit); `types`: of what it holds.
    `processing`: tokenizer or processor of a recipe and its training rows. `head`: of the training rows. `features`: rows as the
    model reads them, and what became of them. `trainer`: what Trainer is given besides model, arguments and rows, of a Setup and
    a model. `measure`: the number by which runs are compared, of the head. `write`: what a trainer writes beside an adapter.
    """

    forms: tuple[tuple[str, ...], ...]
    example: Mapping[str, str]
    row: Callable[[Mapping[str, Any], Known], dict[str, Any]]
    types: Mapping[str, str]
    processing: Callable[[Any, Any], Any]
    head: Callable[[Any, Any, Source, Any], Head]
    features: Callable[[Any, Part], tuple[Any, Tally]]
    trainer: Callable[[Any, Any], dict[str, Any]]
    measure: Callable[[Head], str] = lambda head: "eval_loss"
    more: tuple[str, ...] = ()
    new_head: bool = False  # a checkpoint without the task has none of its own
    others: str = ""  # the kind of all other columns, where they are kept as they are
    write: Callable[[Any, Path], None] = lambda trainer, folder: None
    in_batches: bool = False  # rows become numbers in batches: they keep what the model does not read
