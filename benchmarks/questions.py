"""GSM8K's rows as questions and answers, and the loss on those that are held out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.model import Batch, Model, folder
from benchmarks.model import check as check_model
from layerpeft.errors import Problems
from layerpeft.recipe import shipped

Example = tuple[list[int], list[int]]  # tokens, and labels with -100 over the question
HELD_OUT_ROWS = 16  # in one batch


def check(kind: str, model: Model, batch: Batch, problems: Problems) -> None:
    """Adds why a kind of measurement cannot learn from these rows."""
    check_model(model, batch, problems)
    if model.shipped is None or batch.text != "gsm8k":
        problems.add(f"model: {kind} needs a model that knows something (shipped) and real rows (batch.text: gsm8k)")


def check_counts(options: object, names: Sequence[str], problems: Problems) -> None:
    """Adds what is less than one of these."""
    for name in names:
        if getattr(options, name) < 1:
            problems.add(f"{name}: {getattr(options, name)} is not at least 1")


def rows(model: Model, which: str, length: int) -> list[Example]:
    """The package's GSM8K rows as question and answer, at most `length` tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(folder(model))
    path = Path(shipped.resolve(f"{shipped.SCHEME}gsm8k_{which}.jsonl"))
    found, read = [], [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    questions = tokenizer([f"Question: {row['question']}\nAnswer:" for row in read])["input_ids"]
    answers = tokenizer([f" {row['answer']}" for row in read])["input_ids"]
    for question, said in zip(questions, answers, strict=True):
        answer = [*said, tokenizer.eos_token_id]
        found.append(((question + answer)[:length], ([-100] * len(question) + answer)[:length]))
    return found


def collated(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """One batch, padded to its longest row."""
    longest = max(len(ids) for ids, _ in examples)
    padded = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in examples:
        rest = longest - len(ids)
        padded["input_ids"].append(ids + [0] * rest)
        padded["attention_mask"].append([1] * len(ids) + [0] * rest)
        padded["labels"].append(labels + [-100] * rest)
    return {name: torch.tensor(values) for name, values in padded.items()}


def held_out(model: Model, length: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of the first `count` rows that nothing trains on."""
    found = rows(model, "eval", length)[:count]
    return [collated(found[i : i + HELD_OUT_ROWS]) for i in range(0, len(found), HELD_OUT_ROWS)]


@torch.no_grad()
def loss(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """The mean over batches."""
    model.eval()
    found = statistics.mean(float(model(**batch).loss) for batch in batches)
    model.train()
    return found
