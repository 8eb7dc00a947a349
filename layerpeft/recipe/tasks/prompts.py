"""Prompts alone, which a model answers itself in training: GRPO and its kin, and on-policy distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerpeft.recipe import tokens
from layerpeft.recipe.rows import Unfit
from layerpeft.recipe.tasks.preferences import ASKED
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import left, tokenizer
from layerpeft.recipe.tasks.turns import prompt_of
from layerpeft.recipe.tasks.written import check_template


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`prompt`, of a conversation what comes before its last answer; all other columns as they are, for reward functions."""
    prompt = prompt_of(cells)
    if isinstance(prompt, list):
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    if not prompt:
        raise Unfit("has no prompt")
    rest = {name: value for name, value in cells.items() if name not in ("prompt", "user", "system")}
    return {**rest, "prompt": prompt}


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """The rows as they are; those without a word of prompt are left out. Raises: RecipeError."""
    check_template(part, given)
    blank = [isinstance(prompt, str) and not prompt.strip() for prompt in part["prompt"]]
    return left(part, [tokens.NO_TEXT if empty else "" for empty in blank], given, part.select)


TAUGHT = Task(
    ASKED,
    {"prompt": "Question: {question}"},
    row,
    {"prompt": "said"},
    tokenizer,
    lambda recipe, rows, source, processing: Head(),
    features,
    lambda setup, model: {},
    others="any",
)
REWARDED = replace(TAUGHT, measure=lambda head: "eval_reward")
