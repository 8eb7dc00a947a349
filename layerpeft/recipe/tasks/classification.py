"""Text (or two) and what it is: one class of several, any number of them, or a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerpeft.errors import Problem, RecipeError
from layerpeft.recipe import tokens
from layerpeft.recipe.model import model_config
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source, Unfit
from layerpeft.recipe.tasks import cell, labels
from layerpeft.recipe.tasks.metrics import class_metrics, label_metrics, number_metrics
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import encoded, longest, tokenizer

ONE, MANY, NUMBER = "single_label_classification", "multi_label_classification", "regression"
CURE = 'with a word it is a class: columns: {text: "{text}", label: "class {label}"}'


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`text`, perhaps `text_pair`, and `label`: the name of a class, or a list of names."""
    found: dict[str, Any] = {"text": cell.text("text", cells["text"])}
    if "text_pair" in cells:
        found["text_pair"] = "" if cells["text_pair"] is None else cell.text("text_pair", cells["text_pair"])
    return {**found, "label": label_of(cells["label"], known.classes("label"))}


def label_of(value: Any, declared: tuple[str, ...]) -> str | list[str]:
    """One name, or several. Raises: Unfit."""
    found = cell.parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(found, list | tuple):
        names = [labels.name_of(item, declared) for item in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise Unfit(f"has the label {twice[0]} twice")
        return names
    return labels.name_of(value, declared)


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    """Names of classes, and the kind of problem. Raises: RecipeError where labels are of different kinds, or of one class."""
    declared = source.classes("label") if not recipe["columns"] else ()
    held = train["label"]
    kind = _kind(recipe, held, declared, source)
    if kind == NUMBER:
        return Head(("score",), {"problem_type": kind})
    if kind == ONE:
        return Head(labels.several(held, declared, model_config(recipe)), {"problem_type": kind})
    names = {name for label in held for name in ([label] if isinstance(label, str) else label)}
    if not declared and not names:
        raise RecipeError(Problem(("dataset_name",), "dataset_name: label: no training row has a class"))
    return Head(labels.ordered(names, declared, model_config(recipe)), {"problem_type": kind})


def _kind(recipe: Recipe, held: Any, declared: tuple[str, ...], source: Source) -> str:
    asked = (recipe["model_init_kwargs"] or {}).get("problem_type")
    if asked not in (None, ONE, MANY, NUMBER):
        text = f"problem_type: {asked!r} is none of {ONE}, {MANY}, {NUMBER}"
        raise RecipeError(Problem(("model_init_kwargs", "problem_type"), f"model_init_kwargs: {text}"))
    if not isinstance(held[0], str):
        found = MANY
    elif declared or asked == ONE or not any(map(labels.measured, held)) and asked != NUMBER:
        found = ONE
    else:
        found = NUMBER
        other = next((i for i, label in enumerate(held) if labels.number(label) is None), None)
        if other is not None:
            place, number = source.place(other), next((label for label in held if labels.measured(label)), None)
            there = f", and the label {number}, a number that is measured, stands elsewhere" if number else ""
            text = f"{place.where}: row {place.number} has the label {held[other]}, which is no number{there}"
            raise RecipeError(
                Problem(("dataset_name",), f"dataset_name: label: labels are of different kinds: {text}; {CURE}")
            )
    if asked is not None and asked != found and not (asked == MANY and found == ONE):
        text = f"problem_type: {asked}, and the labels of the rows make it {found}"
        raise RecipeError(Problem(("model_init_kwargs", "problem_type"), f"model_init_kwargs: {text}"))
    return asked or found


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """Token ids, and as `labels` the number of the class, a vector of zeros and ones, or a number."""
    names, kind = {name: i for i, name in enumerate(given.head.labels)}, given.head.values["problem_type"]
    held = part["label"]
    if kind == NUMBER:
        other = next(
            (i for i, label in enumerate(held) if not isinstance(label, str) or labels.number(label) is None), None
        )
        if other is not None:
            place = given.source.place(other)
            text = f"{given.key}: {place.where}: row {place.number} has the label {held[other]}, and training rows have numbers"
            raise RecipeError(Problem((given.key,), text))
    else:
        several = ([label] if isinstance(label, str) else label for label in held)
        labels.refuse_strange(given.key, "label", several, names, given.source)
    limit = longest(given.recipe, given.processing)

    def target(label: Any) -> Any:
        if kind == NUMBER:
            return float(label)
        if kind == ONE:
            return names[label]
        return [float(name in ([label] if isinstance(label, str) else label)) for name in names]

    def encode(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        pair = (row["text_pair"],) if "text_pair" in row else ()
        ids = given.processing(row["text"], *pair, verbose=False)
        fate = tokens.NO_TEXT if not ids["input_ids"] else "" if row["text"].strip() or any(pair) else "blank"
        if limit is not None and len(ids["input_ids"]) > limit:
            ids, fate = given.processing(row["text"], *pair, truncation=True, max_length=limit), "cut"
        return {**ids, "labels": target(row["label"])}, fate

    return encoded(part, given, encode)


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    """The collator pads; numbers are those of the kind of problem."""
    from transformers import DataCollatorWithPadding

    kind = setup.learned.values["problem_type"]

    def metrics(prediction: Any) -> dict[str, float]:
        logits, wanted = _logits(prediction.predictions), prediction.label_ids
        if kind == NUMBER:
            return number_metrics(logits.reshape(-1).tolist(), wanted.reshape(-1).tolist())
        if kind == MANY:
            return label_metrics((logits > 0).tolist(), (wanted > 0.5).tolist())
        return class_metrics(logits.argmax(-1).tolist(), wanted.tolist())

    return {"data_collator": DataCollatorWithPadding(setup.tokenizer), "compute_metrics": metrics}


def _logits(predictions: Any) -> Any:
    return predictions[0] if isinstance(predictions, tuple) else predictions


def measure(head: Head) -> str:
    return "eval_loss" if head.values["problem_type"] == NUMBER else "eval_macro_f1"


TASK = Task(
    forms=(("text", "label"), ("text", "text_pair", "label")),
    more=("text_pair",),
    example={"text": "{sentence}", "label": "{class}"},
    row=row,
    types={},
    processing=tokenizer,
    head=head,
    features=features,
    trainer=trainer,
    new_head=True,
    measure=measure,
)
