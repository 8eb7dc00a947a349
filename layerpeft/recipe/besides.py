"""What a recipe's trainer holds beside its model, for a plan: no weight is read."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import transformers

from layerpeft.integrations.empty import empty_model
from layerpeft.integrations.tracing import weight_bytes
from layerpeft.planning.beside import Beside, Other, Writing
from layerpeft.recipe.beside import rewards, teachers
from layerpeft.recipe.beside.models import load, place_of
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.trainer import Setup
from layerpeft.saving.manifest import CONFIG
from layerpeft.tuners.load import adapter_config

TOKENS = ("max_completion_length", "max_new_tokens")  # the trainers' names of an answer's length


def beside_of(recipe: Recipe, arguments: Any) -> Beside | None:
    """Teacher, models that reward, and answers that are written; None of a trainer with none of them. Raises: RecipeError."""
    at_once = getattr(arguments, "steps_per_generation", None) or 1
    others = [*_teacher(recipe), *_judges(recipe, at_once)]
    writing = None
    if recipe.row.writes:
        tokens = next(n for name in TOKENS if (n := getattr(arguments, name, None)) is not None)
        writing = Writing(int(tokens), at_once)
    return Beside(tuple(others), writing) if others or writing else None


def longest_prompt(setup: Setup, tried: int) -> int | None:
    """Tokens of the longest of the first prompts; None where rows have no prompt of their own."""
    if "prompt" not in (getattr(setup.train, "column_names", None) or ()):
        return None
    prompts = [row["prompt"] for row in islice(setup.train, tried)]
    coder: Any = setup.tokenizer
    texts = [p if isinstance(p, str) else coder.apply_chat_template(p, tokenize=False) for p in prompts]
    return max((len(ids) for ids in coder(texts)["input_ids"]), default=None)


def _teacher(recipe: Recipe) -> list[Other]:
    place = recipe.get(teachers.KEY)
    if teachers.KEY not in recipe.row.needs or not place:
        return []
    config = load(recipe, teachers.KEY, transformers.AutoConfig.from_pretrained, place)
    dtype = (recipe["teacher_model_init_kwargs"] or {}).get("dtype", recipe["dtype"])
    return [_other(f"teacher {place}", transformers.AutoModelForCausalLM, config, dtype, teaches=True)]


def _judges(recipe: Recipe, at_once: int) -> list[Other]:
    """The reward models of a recipe; of an adapter, its base."""
    if rewards.KEY not in recipe.row.keys:
        return []
    found = []
    for reward in map(rewards.parsed, rewards.listed(recipe[rewards.KEY])):
        if rewards.is_model(reward):
            place = Path(place_of(reward.asked))
            adapted = (place / CONFIG).is_file()
            base = adapter_config(place)["base_model_name_or_path"] if adapted else reward.asked
            config = load(recipe, rewards.KEY, transformers.AutoConfig.from_pretrained, base, num_labels=1)
            kind = transformers.AutoModelForSequenceClassification
            found.append(_other(f"reward model {reward.asked}", kind, config, recipe["dtype"], at_once))
    return found


def _other(name: str, kind: Any, config: Any, dtype: Any, rows: int = 1, teaches: bool = False) -> Other:
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # a classifier reads where a row ends, which a plan does not
    model = empty_model(kind, config, dtype)
    return Other(name, model, weight_bytes(model), teaches, rows)
