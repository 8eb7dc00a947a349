"""Rows of transformers' trainers: a task each, with rows of its own kind."""

from __future__ import annotations

from typing import Any

from layerpeft.recipe.trainers.row import Row
from layerpeft.selection.typecheck import Setting

# beside TRL's classes, which have these themselves
LOADING = {"trust_remote_code": Setting(bool, False), "model_init_kwargs": Setting(dict[str, Any] | None)}
TRAINER = ("transformers.Trainer", "transformers.TrainingArguments")
WRITER = ("transformers.Seq2SeqTrainer", "transformers.Seq2SeqTrainingArguments")
TASKS = "layerpeft.recipe.tasks"
FINDS = ("predict", "eval")  # what a model is used by that writes no text


def _text(length: int) -> dict[str, Setting]:
    return LOADING | {"max_length": Setting(int | None, length)}


ROWS = (
    Row(
        "classification", *TRAINER, "AutoModelForSequenceClassification", "SEQ_CLS", f"{TASKS}.classification.TASK", _text(512),
        one_class=True, used=FINDS,
    ),
    Row(
        "token_classification", *TRAINER, "AutoModelForTokenClassification", "TOKEN_CLS", f"{TASKS}.tagging.TASK", _text(512),
        used=FINDS,
    ),
    Row(
        "question_answering", *TRAINER, "AutoModelForQuestionAnswering", "QUESTION_ANS", f"{TASKS}.answers.TASK",
        _text(384) | {"stride": Setting(int, 128)}, used=FINDS,
    ),
    Row(
        "seq2seq", *WRITER, "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", f"{TASKS}.rewriting.TASK",
        _text(512) | {"max_target_length": Setting(int | None, 128)},
    ),
    Row(
        "masked_lm", *TRAINER, "AutoModelForMaskedLM", None, f"{TASKS}.raw_text.MASKED",
        _text(512) | {"mlm_probability": Setting(float, 0.15)}, used=("eval",),
    ),
    Row("causal_lm", *TRAINER, "AutoModelForCausalLM", "CAUSAL_LM", f"{TASKS}.raw_text.NEXT", _text(512)),
    Row(
        "image_classification", *TRAINER, "AutoModelForImageClassification", None, f"{TASKS}.images.TASK", LOADING,
        one_class=True, used=FINDS,
    ),
    Row(
        "speech", *WRITER, f"{TASKS}.speech.auto_name", None, f"{TASKS}.speech.TASK",
        LOADING | {"max_target_length": Setting(int | None, 448), "max_seconds": Setting(float | None, 30.0)}, used=FINDS,
    ),
    Row(
        "embeddings", "sentence_transformers.SentenceTransformerTrainer",
        "sentence_transformers.SentenceTransformerTrainingArguments", f"{TASKS}.embeddings.auto_name", "FEATURE_EXTRACTION",
        f"{TASKS}.embeddings.TASK", _text(512) | {"loss": Setting(str | dict[str, Any] | None)}, alone=False, each=2,
        package="sentence_transformers", made="layerpeft.integrations.sentences.trainer", vectors=True, used=FINDS,
    ),
)  # fmt: skip
# `sft` on rows with pictures, for a model that sees
SEEING = Row(
    "sft",
    "trl.SFTTrainer",
    "trl.SFTConfig",
    "AutoModelForImageTextToText",
    None,
    f"{TASKS}.seeing.TASK",
    trl=True,
    used=(),
)
