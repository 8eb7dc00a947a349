"""A picture and the class of what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerpeft.recipe import tokens
from layerpeft.recipe.model import from_hub, model_config, model_path
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source
from layerpeft.recipe.tasks import files, labels
from layerpeft.recipe.tasks.classification import ONE
from layerpeft.recipe.tasks.metrics import class_metrics
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import where


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`image`, a file, and `label`, the name of its class. Every picture is looked at once."""
    image = files.held("image", cells["image"], known.homes)
    files.picture(image)
    return {"image": image, "label": labels.name_of(cells["label"], known.classes("label"))}


def processing(recipe: Recipe, rows: Any) -> Any:
    """The image processor of the recipe's model."""
    from transformers import AutoImageProcessor

    return from_hub(recipe, AutoImageProcessor.from_pretrained, model_path(recipe), **where(recipe))


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    """Names of classes. Raises: RecipeError where there is one only."""
    declared = source.classes("label") if not recipe["columns"] else ()
    return Head(labels.several(train["label"], declared, model_config(recipe)), {"problem_type": ONE})


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """The picture as it is, and as `labels` the number of its class; it becomes numbers in a batch."""
    names = {name: i for i, name in enumerate(given.head.labels)}
    labels.refuse_strange(given.key, "label", ([name] for name in part["label"]), names, given.source)
    made = part.add_column("labels", [names[name] for name in part["label"]]).remove_columns("label")
    return made, tokens.tally([""] * len(part), None, lambda i: given.source.place(i).where)


class Pixels:
    """Makes batches of pictures: `pixel_values` of shape (rows, channels, height, width), and `labels`."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        made = dict(self.processor([files.picture(row["image"]) for row in rows], return_tensors="pt"))
        return made | {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else made


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    def metrics(prediction: Any) -> dict[str, float]:
        return class_metrics(prediction.predictions.tolist(), prediction.label_ids.tolist())

    return {
        "data_collator": Pixels(setup.tokenizer),
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    }


TASK = Task(
    forms=(("image", "label"),),
    example={"image": "{file}", "label": "{class}"},
    row=row,
    types={"image": "file"},
    processing=processing,
    head=head,
    features=features,
    trainer=trainer,
    new_head=True,
    measure=lambda head: "eval_macro_f1",
    in_batches=True,
)
