"""Models beside the one that is trained: a teacher, or one that rewards."""

from __future__ import annotations

from typing import Any

import transformers

from layerpeft.errors import Problem, RecipeError
from layerpeft.integrations.places import expanded
from layerpeft.recipe.model import allow, code_of, loaded
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.shipped import resolve


def place_of(name: str) -> str:
    """The folder of a model that lies here, or its name on the hub."""
    path = expanded(resolve(name))
    return str(path) if path.is_dir() else name


def load(recipe: Recipe, key: str, call: Any, name: str, **options: Any) -> Any:
    """What transformers loads for a key of the recipe; code of its own is named first. Raises: RecipeError."""
    place, trusted = place_of(name), recipe["trust_remote_code"]
    if trusted:
        allow(key, f"trust_remote_code: true ({key})", code_of(place, options.get("revision")))
    return loaded(key, name, recipe.path.parent, call, place, trust_remote_code=trusted, **options)


def vocabulary(config: Any) -> int:
    """How many tokens a model has a number for."""
    return int(config.get_text_config().vocab_size)


def tokenizer(recipe: Recipe, key: str, name: str) -> Any:
    """The tokenizer of such a model, with a token that pads."""
    found = load(recipe, key, transformers.AutoTokenizer.from_pretrained, name)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def wrong(key: str, text: str) -> RecipeError:
    """What is wrong with a key."""
    return RecipeError(Problem((key,), f"{key}: {text}"))
