"""Tokenizers as tasks need them, and rows of text as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerpeft.errors import Problem, RecipeError
from layerpeft.recipe import tokens
from layerpeft.recipe.model import code, from_hub, loading, model_path
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.tasks.task import Part

MODEL = "model_name_or_path"


def tokenizer(recipe: Recipe, rows: Any = None) -> Any:
    """The tokenizer of the recipe's model, with a token that pads."""
    from transformers import AutoTokenizer

    found = from_hub(recipe, AutoTokenizer.from_pretrained, model_path(recipe), **where(recipe))
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def where(recipe: Recipe) -> dict[str, Any]:
    """What loading anything that lies beside a model is told."""
    return {k: v for k, v in loading(recipe).items() if k in ("revision", "subfolder")} | code(recipe)


def needs(recipe: Recipe, there: Any, what: str) -> None:
    """Raises: RecipeError where the model's tokenizer is not of a kind that the task needs."""
    if not there:
        raise RecipeError(
            Problem((MODEL,), f"{MODEL}: trainer: {recipe.trainer} needs {what}, which this model does not have")
        )


def longest(recipe: Recipe, tokenizer: Any) -> int | None:
    """Tokens of a row: as many as the recipe says, and no more than the model has places for, where its tokenizer knows."""
    most = getattr(tokenizer, "model_max_length", None)
    known = most if isinstance(most, int) and most < 2**20 else None
    return min((n for n in (recipe.get("max_length"), known) if n is not None), default=None)


Encode = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], str]]


def encoded(part: Any, given: Part, encode: Encode) -> tuple[Any, tokens.Tally]:
    """Rows through `encode`, which says what becomes of each ("", "cut", "blank", or why it teaches nothing); those that are left.

    Raises: RecipeError where none is.
    """
    made = part.map(
        lambda row: {**(found := encode(row))[0], "fate": found[1]}, remove_columns=part.column_names, desc="Tokenizing"
    )
    return left(made, list(made["fate"]), given, lambda kept: made.select(kept))


def left(made: Any, fates: Sequence[str], given: Part, kept_of: Callable[[list[int]], Any]) -> tuple[Any, tokens.Tally]:
    """What teaches something of rows that have these fates, and what became of all."""
    found = tokens.tally(list(fates), longest(given.recipe, given.processing), lambda i: given.source.place(i).where)
    kept = [i for i, fate in enumerate(fates) if fate in ("", "cut", "blank")]
    if not kept or found.blank == found.read:
        why = " or ".join(found.dropped) or tokens.NO_TEXT
        first = found.first or given.source.place(0).where
        text = f"{given.key}: 0 of {found.read} {tokens.WHAT[given.key]} rows left: all {why} (the first: {first})"
        raise RecipeError(Problem((given.key,), text))
    made = made if len(kept) == len(fates) else kept_of(kept)
    return made.remove_columns("fate") if "fate" in made.column_names else made, found
