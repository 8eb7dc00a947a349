"""Pairs of answers of which one was preferred, and single answers that were liked or not: for DPO, KTO and their kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerpeft.recipe import tokens
from layerpeft.recipe.rows import TURNS, Unfit
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import left, tokenizer
from layerpeft.recipe.tasks.turns import Turns, answer, asked, prompt_of, question, said
from layerpeft.recipe.tasks.written import check_template, texts

ASKED = (
    ("prompt",),
    *((name,) for name in TURNS),
    ("system", "user"),
    ("user",),
    ("instruction",),
)  # how a prompt may be given
PAIRED = (*((*form, "chosen", "rejected") for form in ASKED), ("chosen", "rejected"))
LIKED = (*((*form, "completion", "label") for form in ASKED), *((name, "label") for name in TURNS))
ANSWERS = ("chosen", "rejected", "completion")
SAME = "have one answer both chosen and rejected"
FLAGS = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}


def pair(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected`, all as text or all as turns; texts without a prompt stay without one."""
    prompt, chosen, rejected = prompt_of(cells), said("chosen", cells["chosen"]), said("rejected", cells["rejected"])
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})
    chosen, rejected = answer(chosen), answer(rejected)
    if prompt is None or chosen[0]["role"] in ("system", "user"):  # the whole conversation, twice
        shared = _shared(chosen, rejected)
        if not shared:
            raise Unfit("has answers, chosen and rejected, that do not begin with one prompt")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return {"prompt": question(prompt), "chosen": chosen, "rejected": rejected}


def _shared(one: Turns, other: Turns) -> int:
    """How many turns two conversations begin with together; each keeps one for its answer."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)


def liked(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`prompt`, `completion` and `label` (whether it was liked), or a pair, which is two of them."""
    if "label" not in cells:
        return pair(cells, known)
    label = FLAGS.get(str(cells["label"]).strip().lower())
    if label is None:
        raise Unfit(f"has the label {cells['label']!r}, which is neither true (liked) nor false")
    prompt = prompt_of(cells)
    assert prompt is not None
    if "completion" in cells:
        completion = said("completion", cells["completion"])
    else:
        name = next(name for name in TURNS if name in cells)
        prompt, completion = asked(name, question(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = question(prompt), answer(completion)
    return {"prompt": prompt, "completion": completion, "label": label}


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """The rows as they are, which TRL turns into tokens; those that teach nothing are left out. Raises: RecipeError."""
    check_template(part, given)
    fates = [_fate(row, given) for row in part]
    return left(part, fates, given, part.select)


def _fate(row: Mapping[str, Any], given: Part) -> str:
    """What becomes of a row: nothing is learned of two answers that are one, nor of one whose prompt fills all room."""
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return SAME
    limit = given.recipe.get("max_length")
    if limit is None:
        return ""
    prompt, *whole = texts(row, [name for name in ANSWERS if name in row], given.processing)
    if max(_length(text, limit, given.processing) for text in whole) <= limit:
        return ""
    if given.recipe.row.one_number:
        return f"are longer than max_length: {limit}"  # TRL leaves them out, too
    return tokens.late(limit) if prompt and _length(prompt, limit, given.processing) >= limit else "cut"


def _length(text: str, limit: int, tokenizer: Any) -> int:
    """Tokens of a text; of one that has room in any case, its bytes."""
    size = len(text.encode()) + 8  # no token is less than a byte, but for those at the ends
    return size if size <= limit else len(tokenizer(text, verbose=False)["input_ids"])


def _no_head(recipe: Any, rows: Any, source: Any, processing: Any) -> Head:
    return Head()


def _one_number(recipe: Any, rows: Any, source: Any, processing: Any) -> Head:
    return Head(("reward",))


def _task(forms: tuple[tuple[str, ...], ...], row: Any, example: Mapping[str, str]) -> Task:
    kinds = {**dict.fromkeys(("prompt", *ANSWERS), "said"), "label": "flag"}
    trainer: Any = lambda setup, model: {}  # noqa: E731
    return Task(forms, example, row, kinds, tokenizer, _no_head, features, trainer, more=("input",))


PAIRS = _task(PAIRED, pair, {"prompt": "{question}\n", "chosen": "{better}", "rejected": "{worse}"})
JUDGED = replace(PAIRS, head=_one_number, measure=lambda head: "eval_accuracy", new_head=True)
UNPAIRED = _task((*LIKED, *PAIRED), liked, {"prompt": "{question}\n", "completion": "{answer}", "label": "{liked}"})
