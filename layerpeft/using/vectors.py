"""A vector for each text, as its SentenceTransformer pools it, and how well vectors tell texts that belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from layerpeft.errors import UsageError
from layerpeft.integrations.sentences import modules_of
from layerpeft.recipe.rows import Source
from layerpeft.recipe.tasks import cell
from layerpeft.recipe.tasks.embeddings import held_by, measured, vectors_of
from layerpeft.recipe.tasks.shape import shape
from layerpeft.recipe.tasks.task import Head, Part
from layerpeft.recipe.tasks.tokenizing import longest
from layerpeft.recipe.trainers.table import absent
from layerpeft.using.evaluate import Found
from layerpeft.using.folder import Trained
from layerpeft.using.ways import Answer, Cells, Way


class Embeds(Way):
    """The vector of a text."""

    forms, more = (("text",), ("sentence",), ("anchor",)), ()

    def __post_init__(self) -> None:
        self.held = _held(self.found, self.model, self.processing, self.limit)

    def columns(self) -> dict[str, str]:
        return {"embedding": "vector"}

    def item(self, cells: Cells) -> Any:
        name, value = next(iter(cells.items()))
        text = cell.text(name, value, empty=False)
        return {**self.shortened(text), "text": text}

    def run(self, items: Sequence[Any]) -> list[Answer]:
        texts = [item["text"] for item in items]
        made = self.held.encode(texts, batch_size=len(texts), show_progress_bar=False, convert_to_tensor=True)
        return [{"embedding": vector} for vector in made.float().tolist()]


def check_there(found: Trained) -> None:
    """Raises: UsageError where sentence-transformers is not installed."""
    if why := absent(found.recipe.row):
        raise UsageError(why)


def evaluate_vectors(found: Trained, source: Source, model: Any, tokenizer: Any, batch: int, columns: Any) -> Found:
    """Spearman's correlation of cosines with scores, or how often the nearest text is the right one. Raises: RecipeError."""
    task = found.recipe.task
    assert task is not None
    rows, tally = task.features(
        shape(source, task, columns), Part(found.recipe, "eval_dataset", source, tokenizer, Head())
    )
    held = _held(found, model, tokenizer, longest(found.recipe, tokenizer))
    numbers = measured(rows, vectors_of(held, found.recipe.values.get("prompts"), batch))
    return Found(numbers, len(rows), left=Counter(tally.dropped))


def _held(found: Trained, model: Any, processing: Any, limit: int | None) -> Any:
    """The SentenceTransformer of a folder, or of its base where the folder keeps none. Raises: RecipeError."""
    place = str(found.folder) if modules_of(str(found.folder)) else found.place
    return held_by(found.recipe, model, place, limit, processing.pad_token)
