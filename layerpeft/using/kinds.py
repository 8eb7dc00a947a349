"""Which way a trained model is asked, by transformers' class for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from layerpeft.errors import UsageError
from layerpeft.using.folder import Trained
from layerpeft.using.hearing import Hears
from layerpeft.using.masks import Fills
from layerpeft.using.vectors import Embeds, check_there
from layerpeft.using.ways import Answers, Classes, Pictures, Rewards, Rewrites, Tags, Way, Writes

WAYS: Mapping[str, type[Way]] = {
    "SequenceClassification": Classes, "TokenClassification": Tags, "QuestionAnswering": Answers, "CausalLM": Writes,
    "Seq2SeqLM": Rewrites, "ImageClassification": Pictures, "MaskedLM": Fills, "CTC": Hears, "SpeechSeq2Seq": Hears,
}  # fmt: skip


PICTURES = ("image", "images")


def check_seen(found: Trained, columns: Collection[str]) -> None:
    """Raises: UsageError for rows with pictures and a model that sees: its answers would be to the words alone."""
    if hasattr(found.config, "vision_config") and (seen := [name for name in PICTURES if name in columns]):
        raise UsageError(
            f"the rows have pictures ({seen[0]}), which {found.folder} sees, and this command reads words alone; ask it with "
            "transformers: pipeline('image-text-to-text', model=…) on a merged model"
        )


def way_of(found: Trained) -> type[Way]:
    """Raises: UsageError for a model that is for something else."""
    if found.recipe.row.one_number:
        return Rewards
    if found.recipe.row.vectors:
        check_there(found)
        return Embeds
    kind = next((way for name, way in WAYS.items() if found.kind.endswith(name)), None)
    if kind is None and found.kind.endswith("ForConditionalGeneration"):
        kind = Rewrites if found.config.is_encoder_decoder else Writes
    if kind is None:
        raise UsageError(f"{found.folder} is for {found.kind}; predictions are made of {', '.join(WAYS)}")
    return kind
