"""A text and what becomes of it: translation, summaries, anything for a model with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerpeft.recipe import tokens
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source
from layerpeft.recipe.tasks import cell
from layerpeft.recipe.tasks.metrics import text_metrics
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import encoded, longest, tokenizer


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`source` and `target`."""
    return {name: cell.text(name, cells[name]) for name in ("source", "target")}


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    return Head()


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """Token ids of the source, and as `labels` those of the target, each cut at a length of its own."""
    limits = {"source": longest(given.recipe, given.processing), "target": given.recipe["max_target_length"]}

    def encode(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        made = {}
        for name, key in (("source", "text"), ("target", "text_target")):
            whole = given.processing(**{key: row[name]}, verbose=False)
            limit = limits[name]
            cut = limit is not None and len(whole["input_ids"]) > limit
            made[name] = given.processing(**{key: row[name]}, truncation=True, max_length=limit) if cut else whole
            made[f"{name} cut"] = cut
        fate = "" if row["source"].strip() and row["target"].strip() else "blank"
        fate = tokens.NO_TEXT if not made["source"]["input_ids"] else fate
        fate = tokens.NO_LABEL if not made["target"]["input_ids"] else fate
        fate = "cut" if fate == "" and (made["source cut"] or made["target cut"]) else fate
        return {**made["source"], "labels": made["target"]["input_ids"]}, fate

    return encoded(part, given, encode)


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    """The collator pads, and makes what the decoder reads; texts are generated and held against the targets if that is asked."""
    from transformers import DataCollatorForSeq2Seq

    given: dict[str, Any] = {"data_collator": DataCollatorForSeq2Seq(setup.tokenizer, model=_decoder_of(model))}
    if setup.recipe["predict_with_generate"]:
        given["compute_metrics"] = generated(setup.tokenizer, text_metrics)
    return given


def _decoder_of(model: Any) -> Any:
    """What makes the decoder's inputs, where PEFT stands around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def generated(tokenizer: Any, judge: Any) -> Any:
    """Trainer's `compute_metrics` over texts that were generated; `judge`: numbers of what was found and wanted."""

    def metrics(prediction: Any) -> dict[str, float]:
        sides = []
        for ids in (prediction.predictions, prediction.label_ids):
            ids = ids[0] if isinstance(ids, tuple) else ids
            ids = [[t for t in line if t >= 0] for line in ids.tolist()]
            sides.append([text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)])
        return judge(*sides)

    return metrics


TASK = Task(
    forms=(("source", "target"),),
    example={"source": "{article}", "target": "{summary}"},
    row=row,
    types={},
    processing=tokenizer,
    head=head,
    features=features,
    trainer=trainer,
)
