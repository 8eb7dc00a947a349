"""Numbers by which models are measured, each worked out by hand from what was found and what was wanted."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

# what Trainer calls them, the better the larger except for losses and errors, and what they are called
NAMES = {
    "eval_loss": "held-out loss", "eval_accuracy": "accuracy", "eval_macro_f1": "macro-F1", "eval_entity_f1": "F1 of entities",
    "eval_exact_match": "exact match", "eval_f1": "F1 of words", "eval_rmse": "root mean squared error",
    "eval_rewards/accuracies": "pairs in the right order", "eval_rewards/margins": "margin of rewards",
    "eval_reward": "mean reward",
    "eval_spearman": "Spearman's correlation", "eval_recall@1": "recall at 1",
    "eval_mae": "mean absolute error", "eval_r2": "R²", "eval_wer": "errors in words", "eval_cer": "errors in characters",
}  # fmt: skip


def class_metrics(found: Sequence[int], wanted: Sequence[int]) -> dict[str, float]:
    """Accuracy, and macro-F1: the plain mean of F1 over every class that occurs in either list."""
    named, asked = Counter(found), Counter(wanted)
    hits = Counter(f for f, w in zip(found, wanted, strict=True) if f == w)
    scores = [2 * hits[label] / (named[label] + asked[label]) for label in {*named, *asked}]
    return {"accuracy": sum(hits.values()) / len(wanted), "macro_f1": sum(scores) / len(scores)}


def label_metrics(found: Sequence[Sequence[bool]], wanted: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Of several labels a row: the share of rows with all of them right, and the mean of F1 over the labels that occur."""
    scores = []
    for f, w in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True):
        if any(f) or any(w):
            scores.append(2 * sum(a and b for a, b in zip(f, w)) / (sum(f) + sum(w)))
    right = sum(list(f) == list(w) for f, w in zip(found, wanted, strict=True))
    return {"accuracy": right / len(wanted), "macro_f1": sum(scores) / len(scores) if scores else 1.0}


def number_metrics(found: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """Of numbers: root mean squared and mean absolute error, and the share of variance explained (R²; 0 where there is none)."""
    errors = [f - w for f, w in zip(found, wanted, strict=True)]
    mean = sum(wanted) / len(wanted)
    squares, spread = sum(e * e for e in errors), sum((w - mean) ** 2 for w in wanted)
    return {
        "rmse": (squares / len(errors)) ** 0.5,
        "mae": sum(map(abs, errors)) / len(errors),
        "r2": 1 - squares / spread if spread else 0.0,
    }


def spearman(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Pearson's correlation of ranks, those of equal numbers being their mean; 0 where all numbers of a side are one."""
    sides = [ranks(found), ranks(wanted)]
    mean = (len(found) + 1) / 2
    one, other = ([rank - mean for rank in side] for side in sides)
    spread = sum(a * a for a in one) * sum(b * b for b in other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / spread**0.5 if spread else 0.0


def ranks(numbers: Sequence[float]) -> list[float]:
    """From 1 for the lowest; those of equal numbers are their mean."""
    order = sorted(range(len(numbers)), key=lambda i: numbers[i])
    found = [0.0] * len(numbers)
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or numbers[order[end]] != numbers[order[begin]]:
            for i in order[begin:end]:
                found[i] = (begin + 1 + end) / 2
            begin = end
    return found


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first and last word of every entity in tags of the scheme IOB (B-X, I-X, O) or IOBES; an I- without a B- begins one."""
    found: set[tuple[str, int, int]] = set()
    kind, begun = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = bool(kind) and mark in ("I", "E") and name == kind
        if kind and not goes_on:
            found.add((kind, begun, i - 1))
            kind = ""
        if not goes_on and mark in ("B", "I", "E", "S"):
            kind, begun = name, i
        if kind and mark in ("E", "S"):
            found.add((kind, begun, i))
            kind = ""
    return found


def has_entities(names: Iterable[str]) -> bool:
    """Whether tags are those of such a scheme."""
    names = set(names)
    return "O" in names and len(names) > 1 and all(n == "O" or re.match(r"[BIES]-.", n) for n in names)


def entity_f1(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """F1 of whole entities, of all kinds together: right only with kind, first and last word."""
    pairs = [(entities(f), entities(w)) for f, w in zip(found, wanted, strict=True)]
    named = sum(len(f) + len(w) for f, w in pairs)
    return 2 * sum(len(f & w) for f, w in pairs) / named if named else 1.0


def plain_words(text: str) -> list[str]:
    """Words in small letters, without punctuation and articles (SQuAD's)."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).split()


def answer_metrics(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of answers, each held against the nearest of those that are right (none: ""): the share that is exact, and F1 of words."""
    exact = f1 = 0.0
    for text, answers in zip(found, wanted, strict=True):
        mine, theirs = plain_words(text), [plain_words(answer) for answer in answers or [""]]
        exact += any(mine == words for words in theirs)
        f1 += max(_shared(mine, words) for words in theirs)
    return {"exact_match": exact / len(found), "f1": f1 / len(found)}


def _shared(mine: list[str], theirs: list[str]) -> float:
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * sum((Counter(mine) & Counter(theirs)).values()) / (len(mine) + len(theirs))


def text_metrics(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Of texts: the share that is exactly right, blanks at the ends aside."""
    return {"exact_match": sum(f.strip() == w.strip() for f, w in zip(found, wanted, strict=True)) / len(wanted)}


def error_rates(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Of what was heard: errors (words, and characters, that are wrong, missing or too many) for each that was said."""
    pairs = list(zip(found, wanted, strict=True))
    words = sum(edits(f.split(), w.split()) for f, w in pairs) / max(1, sum(len(w.split()) for w in wanted))
    return {"wer": words, "cer": sum(edits(f, w) for f, w in pairs) / max(1, sum(map(len, wanted)))}


def edits(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """The fewest items to change, add and take out until one list is the other (Levenshtein's distance)."""
    row = list(range(len(wanted) + 1))
    for i, item in enumerate(found, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (item != other))
    return row[-1]
