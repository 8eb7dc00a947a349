"""Prompts with their answers, of which GKD's teacher says how likely each token is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerpeft.recipe import tokens
from layerpeft.recipe.rows import TURNS
from layerpeft.recipe.tasks import cell
from layerpeft.recipe.tasks.preferences import ASKED
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import encoded, tokenizer
from layerpeft.recipe.tasks.turns import answer, asked, prompt_of, question, said
from layerpeft.recipe.tasks.written import check_template
from layerpeft.recipe.templates import EXAMPLE

SPOKEN = (("system", "user", "assistant"), ("user", "assistant"))
FORMS = (*((*form, "completion") for form in ASKED), *((name,) for name in TURNS), *SPOKEN)


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`prompt` and `completion`, both as text or both as turns."""
    prompt = prompt_of(cells)
    assert prompt is not None
    if "assistant" in cells:
        completion: Any = cell.text("assistant", cells["assistant"])
    elif "completion" in cells:
        completion = said("completion", cells["completion"])
    else:
        prompt, completion = asked(next(name for name in TURNS if name in cells), question(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = question(prompt), answer(completion)
    return {"prompt": prompt, "completion": completion}


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """Token ids, with a mask of what was answered; answers end with the end of text, or as the chat template ends them."""
    check_template(part, given)
    limit, end = given.recipe["max_length"], given.processing.eos_token or ""

    def encode(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            whole, begun = prompt + completion + end * (not completion.endswith(end)), prompt
        else:
            begun = given.processing.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            whole = given.processing.apply_chat_template([*prompt, *completion], tokenize=False)
        chat = {"add_special_tokens": False} if isinstance(prompt, list) else {}
        first = given.processing(begun, verbose=False, **chat)["input_ids"]
        ids = given.processing(whole, verbose=False, **chat)["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(first, ids)) if a != b), min(len(first), len(ids)))
        fate = "" if limit is None or len(ids) <= limit else "cut"
        ids = ids[:limit]
        if not shared:
            fate = "have no prompt"
        elif shared >= len(ids):
            fate = tokens.late(limit) if fate else tokens.NO_LABEL
        mask = [int(i >= shared) for i in range(len(ids))]
        return {"prompt": begun, "input_ids": ids, "attention_mask": [1] * len(ids), "completion_mask": mask}, fate

    return encoded(part, given, encode)


TASK = Task(
    FORMS,
    EXAMPLE,
    row,
    {"prompt": "said", "completion": "said"},
    tokenizer,
    lambda recipe, rows, source, processing: Head(),
    features,
    lambda setup, model: {},
)
