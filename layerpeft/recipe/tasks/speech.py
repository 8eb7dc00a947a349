"""Sounds and what is said in them: a model that spells (CTC), or one that writes (an encoder and a decoder)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, Problem, RecipeError
from layerpeft.recipe import tokens
from layerpeft.recipe.model import from_hub, model_config, model_path
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source
from layerpeft.recipe.tasks import audio, cell, files
from layerpeft.recipe.tasks.metrics import error_rates
from layerpeft.recipe.tasks.rewriting import generated
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import where
from layerpeft.recipe.toys.sounds import wav

BLANK, UNKNOWN, BETWEEN = "[PAD]", "[UNK]", "|"


def writes(config: Any) -> bool:
    """Whether a model writes what it hears, with a decoder; others spell it."""
    return bool(getattr(config, "is_encoder_decoder", False))


def auto_name(recipe: Recipe) -> str:
    """The class of transformers for the recipe's model."""
    return "AutoModelForSpeechSeq2Seq" if writes(model_config(recipe)) else "AutoModelForCTC"


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`audio`, a file, `text`, and how long it is (`seconds`). Every sound is read once."""
    file = file_of(cells["audio"], known.homes)
    return {"audio": file, "text": cell.text("text", cells["text"], empty=False), "seconds": audio.seconds(file)}


def file_of(value: Any, homes: Sequence[str]) -> dict[str, Any]:
    """The sound of a cell, with numbers in it too, as bytes or a path. Raises: Unfit."""
    if isinstance(value, Mapping) and "array" in value:
        value = {"bytes": _written(value)}
    return files.held("audio", value, homes)


def _written(value: Mapping[str, Any]) -> bytes:
    import numpy as np

    return wav(np.asarray(value["array"], "float64"), int(value["sampling_rate"]))


def processing(recipe: Recipe, rows: Any) -> Any:
    """The processor of the recipe's model; of a model that has no words yet one with the letters of the training rows."""
    from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

    if writes(model_config(recipe)):
        return from_hub(recipe, AutoProcessor.from_pretrained, model_path(recipe), **where(recipe))
    try:
        own = AutoTokenizer.from_pretrained(model_path(recipe), **where(recipe))
    except LayerpeftError:
        raise
    except Exception:  # there is none: whatever the library says of it
        own = letters(rows["text"])
    hears = from_hub(recipe, AutoFeatureExtractor.from_pretrained, model_path(recipe), **where(recipe))
    return _joined(hears, own)


def _joined(hears: Any, own: Any) -> Any:
    from transformers import Wav2Vec2Processor

    return Wav2Vec2Processor(hears, own)


def letters(texts: Any) -> Any:
    """A tokenizer of every character of these texts, of one for the blank between words, one for what is unknown and CTC's own."""
    from transformers import Wav2Vec2CTCTokenizer

    found = sorted({c for text in texts for c in " ".join(text.split())} - {" "})
    names = [BLANK, UNKNOWN, BETWEEN, *(c for c in found if c != BETWEEN)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.json")
        Path(path).write_text(json.dumps({c: i for i, c in enumerate(names)}, ensure_ascii=False), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            path, pad_token=BLANK, unk_token=UNKNOWN, word_delimiter_token=BETWEEN, bos_token=None, eos_token=None
        )


def head(recipe: Recipe, train: Any, source: Source, processing: Any) -> Head:
    """Of a model that spells: as many outputs as there are letters, and which of them is CTC's blank."""
    if writes(model_config(recipe)):
        return Head()
    size = len(processing.tokenizer)
    return Head(
        values={"vocab_size": size, "pad_token_id": processing.tokenizer.pad_token_id, "ctc_loss_reduction": "mean"}
    )


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """The sound as it is, and as `labels` token ids of what is said. Letters that the training rows do not have are an error."""
    spells, limit = not writes(model_config(given.recipe)), given.recipe["max_target_length"]
    words = given.processing.tokenizer
    longest = given.recipe["max_seconds"]
    held, fates, strange = [], [], {}
    for i, (text, length) in enumerate(zip(part["text"], part["seconds"], strict=True)):
        ids = words(text if not spells else " ".join(text.split()))["input_ids"]
        if spells and words.unk_token_id in ids:
            strange.setdefault(next((c for c in text if words(c)["input_ids"] == [words.unk_token_id]), text), i)
        cut = not spells and limit is not None and len(ids) > limit
        held.append(ids[:limit] if cut else ids)
        fates.append(
            f"are longer than max_seconds: {longest:g}"
            if longest is not None and length > longest
            else "cut"
            if cut
            else ""
        )
    if strange:
        shown = ", ".join(f"{c!r} ({given.source.place(i).where})" for c, i in list(strange.items())[:3])
        text = (
            f"{given.key}: text: characters that the model has no letters for: {shown}; take them out, or write others"
        )
        raise RecipeError(Problem((given.key,), text))
    made = part.add_column("labels", held).remove_columns(["text", "seconds"])
    keep = [i for i, fate in enumerate(fates) if fate in ("", "cut")]
    found = tokens.tally(fates, limit, lambda i: given.source.place(i).where)
    if not keep:
        raise RecipeError(
            Problem((given.key,), f"{given.key}: no row is left: all {fates[0]} (the first: {found.first})")
        )
    return made if len(keep) == len(made) else made.select(keep), found


def numbers(heard: Sequence[Any], hears: Any) -> dict[str, Any]:
    """Sounds of shape (samples,), at its rate, as a model reads them through the feature extractor `hears`."""
    more = {"padding": True} if hears.model_input_names[0] == "input_values" else {}
    return dict(hears(list(heard), sampling_rate=hears.sampling_rate, return_tensors="pt", **more))


class Sounds:
    """Makes batches of sounds, as the model's processor hears them, and of `labels`; what pads these teaches nothing."""

    def __init__(self, processor: Any, start: int | None) -> None:
        self.hears, self.words, self.start = processor.feature_extractor, processor.tokenizer, start

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        made = numbers([audio.sound(row["audio"], self.hears.sampling_rate) for row in rows], self.hears)
        if "labels" not in rows[0]:
            return made
        ids = [row["labels"] for row in rows]
        if self.start is not None and all(line[:1] == [self.start] for line in ids):
            ids = [line[1:] for line in ids]  # the decoder begins with it by itself
        longest = max(map(len, ids))
        return made | {"labels": torch.tensor([[*line, *[-100] * (longest - len(line))] for line in ids])}


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    """Errors in words and characters: of what is spelled always, of what is written where it is to be generated."""
    words = setup.tokenizer.tokenizer
    config = model.config
    if writes(config):
        given: dict[str, Any] = {"data_collator": Sounds(setup.tokenizer, config.decoder_start_token_id)}
        return given | (
            {"compute_metrics": generated(words, error_rates)} if setup.recipe["predict_with_generate"] else {}
        )

    def metrics(prediction: Any) -> dict[str, float]:
        wanted = [[t for t in line if t >= 0] for line in prediction.label_ids.tolist()]
        found = [[t for t in line if t >= 0] for line in prediction.predictions.tolist()]
        return error_rates(spelled(words, found), [words.decode(line, group_tokens=False) for line in wanted])

    return {
        "data_collator": Sounds(setup.tokenizer, None),
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    }


def spelled(words: Any, ids: Any) -> list[str]:
    """Texts of the likeliest letter in every moment: repeated ones count once, and blanks not at all."""
    return [words.decode(line) for line in ids]


TASK = Task(
    forms=(("audio", "text"),),
    example={"audio": "{file}", "text": "{sentence}"},
    row=row,
    types={"audio": "file", "seconds": "number"},
    processing=processing,
    head=head,
    features=features,
    trainer=trainer,
    new_head=True,
    in_batches=True,
)
