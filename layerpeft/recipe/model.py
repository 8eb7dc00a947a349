"""The model that a recipe names: its class, its config, and its architecture without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from layerpeft.errors import Problem, RecipeError, told
from layerpeft.integrations import empty
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.shipped import resolve


def auto_class(recipe: Recipe) -> Any:
    """The class of transformers that builds it."""
    sft = recipe.trainer == "sft"
    return transformers.AutoModelForCausalLM if sft else transformers.AutoModelForSequenceClassification


def model_path(recipe: Recipe) -> str:
    """Its folder, or its name on the hub."""
    path = Path(resolve(recipe["model_name_or_path"])).expanduser()
    return str(path) if path.is_dir() else recipe["model_name_or_path"]


def code(recipe: Recipe) -> dict[str, Any]:
    """Whether code that comes with a model may run."""
    return {"trust_remote_code": recipe["trust_remote_code"]}


def from_hub(recipe: Recipe, call: Any, *args: Any, **options: Any) -> Any:
    """What transformers loads. Raises: RecipeError in one sentence when it cannot."""
    try:
        return call(*args, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        text = f"model_name_or_path: cannot load {recipe['model_name_or_path']!r}: {told(error, 500)}"
        raise RecipeError(Problem(("model_name_or_path",), text)) from error


def model_config(recipe: Recipe, labels: Sequence[str] = (), padding: int | None = None) -> Any:
    """Its config, with a head for `labels`; `padding`: the tokenizer's, for such a head. Raises: RecipeError."""
    extra: dict[str, Any] = {}
    if labels:
        extra = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        extra["problem_type"] = "single_label_classification"  # whatever the checkpoint's own head was for
    load = transformers.AutoConfig.from_pretrained
    config = from_hub(recipe, load, model_path(recipe), revision=recipe["model_revision"], **code(recipe), **extra)
    if labels and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = padding  # the head reads the last token that is no padding
    return config


def empty_model(recipe: Recipe, labels: Sequence[str] = (), padding: int | None = None) -> nn.Module:
    """It without weights. Raises: RecipeError."""
    config = model_config(recipe, labels, padding)
    return from_hub(recipe, empty.empty_model, auto_class(recipe), config, recipe["dtype"], **code(recipe))


def check_head(recipe: Recipe, labels: Sequence[str]) -> None:
    """Raises: RecipeError where the checkpoint has a head of another size than the classes, and says so."""
    config = model_config(recipe)
    heads = any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or ())
    drawn = (recipe["model_init_kwargs"] or {}).get("ignore_mismatched_sizes")
    if heads and not drawn and config.num_labels != len(labels):
        classes = "1 class" if config.num_labels == 1 else f"{config.num_labels} classes"
        text = (
            f"the checkpoint has a head for {classes}, the rows have {len(labels)}; "
            "model_init_kwargs: {ignore_mismatched_sizes: true} draws a new one"
        )
        raise RecipeError(Problem(("model_name_or_path",), f"model_name_or_path: {text}"))
