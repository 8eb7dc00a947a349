"""The model from which another one learns, at `teacher_model_name_or_path`."""

from __future__ import annotations

from typing import Any

import transformers

from layerpeft.recipe.beside.models import load, vocabulary, wrong
from layerpeft.recipe.model import model_config
from layerpeft.recipe.recipe import Recipe

KEY = "teacher_model_name_or_path"


def ready(setup: Any) -> None:
    """Raises: RecipeError, as `check` does."""
    check(setup.recipe)


def check(recipe: Recipe) -> None:
    """Raises: RecipeError where teacher and student do not have as many tokens; no weight is loaded."""
    own, theirs = (
        vocabulary(model_config(recipe)),
        vocabulary(load(recipe, KEY, _config, recipe[KEY], **_where(recipe))),
    )
    if own != theirs:
        raise wrong(
            KEY, f"the teacher has {theirs} tokens and the model {own}; a teacher has the tokenizer of its student"
        )


def given(setup: Any) -> dict[str, Any]:
    """The teacher with its weights, in the recipe's `dtype` unless `teacher_model_init_kwargs` has another. Raises: RecipeError."""
    recipe = setup.recipe
    options = {"dtype": recipe["dtype"], **(recipe["teacher_model_init_kwargs"] or {}), **_where(recipe)}
    return {
        "teacher_model": load(recipe, KEY, transformers.AutoModelForCausalLM.from_pretrained, recipe[KEY], **options)
    }


def _config(place: str, **options: Any) -> Any:
    return transformers.AutoConfig.from_pretrained(place, **options)


def _where(recipe: Recipe) -> dict[str, Any]:
    asked = (recipe["teacher_model_init_kwargs"] or {}).get("revision", recipe.get("teacher_model_revision"))
    return {} if asked is None else {"revision": asked}
