"""Chats about pictures, for a model that sees: TRL makes the batches, with the model's own processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from layerpeft.errors import LayerpeftError
from layerpeft.integrations.places import expanded
from layerpeft.recipe import tokens
from layerpeft.recipe.model import from_hub, model_path
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import TURNS, Source, Unfit, columns_here
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.sources import paths
from layerpeft.recipe.tasks import cell, files, turns
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import where
from layerpeft.recipe.trainers.tasks import SEEING

SEEN = ("images", "image")
TEXTS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",))


def sees(values: Mapping[str, Any], trainer: str) -> bool:
    """Whether rows have pictures, by templates or else by the columns of their files, and the recipe's model answers about such."""
    name, data, columns = (values.get(key) for key in ("model_name_or_path", "dataset_name", "columns"))
    if trainer != SEEING.name or not isinstance(name, str):
        return False
    try:
        have = columns or [column for path in paths(data) for column in columns_here(path)]
        if not set(SEEN) & set(have):
            return False
        place = expanded(resolve(name))
        config, _ = PreTrainedConfig.get_config_dict(str(place) if place.is_dir() else name)
    except (LayerpeftError, OSError, ValueError):  # whatever is wrong with one of them is said elsewhere
        return False
    return config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """The texts of a chat as TRL reads them, and `images`, files. Every picture is looked at once."""
    column = next(name for name in SEEN if name in cells)
    value = cell.parsed(cells[column])
    shown = value if isinstance(value, list | tuple) else [value]
    images = [files.held(column, item, known.homes) for item in shown]
    for image in images:
        files.picture(image)
    found: dict[str, Any] = {"images": images}
    texts = {name: value for name, value in cells.items() if name not in SEEN}
    if "user" in texts:
        asked = turns.prompt_of(texts)
        return {**found, "prompt": asked, "completion": turns.answer(cell.text("assistant", texts.get("assistant")))}
    for name in texts:
        found["messages" if name in TURNS else name] = turns.said(name, texts[name])
    if len({isinstance(found[name], str) for name in ("prompt", "completion") if name in found}) > 1:
        raise Unfit("has turns for one of its prompt and completion, and text for the other; write both one way")
    return found


def processing(recipe: Recipe, rows: Any) -> Any:
    """The processor of the recipe's model."""
    from transformers import AutoProcessor

    return from_hub(recipe, AutoProcessor.from_pretrained, model_path(recipe), **where(recipe))


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    return Head()


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """The rows, whose pictures `datasets` opens where TRL asks for them."""
    import datasets

    made = part.cast_column("images", datasets.List(datasets.Image()))
    return made, tokens.tally([""] * len(part), None, lambda i: given.source.place(i).where)


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    return {}


TASK = Task(
    forms=tuple((*form, seen) for form in (*TEXTS, ("user", "assistant")) for seen in SEEN),
    more=("system",),
    example={"image": "{file}", "prompt": "{question}", "completion": "{answer}"},
    row=row,
    types={"images": "files", "messages": "said", "prompt": "said", "completion": "said"},
    processing=processing,
    head=head,
    features=features,
    trainer=trainer,
)
