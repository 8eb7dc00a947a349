"""Prompts and answers as the text that a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerpeft.errors import Problem, RecipeError, told
from layerpeft.recipe.tasks.task import Part


def check_template(part: Any, given: Part) -> None:
    """Raises: RecipeError where rows are conversations, and the tokenizer has no template that can write them."""
    name = next((n for n in ("prompt", "messages") if len(part) and isinstance(part[0].get(n), list)), None)
    if name is None:
        return
    if given.processing.chat_template is None and not given.recipe.values.get("chat_template_path"):
        text = (
            f"{given.key}: the rows are conversations, and the model's tokenizer has no chat template; write rows as text, as in "
            'columns: {prompt: "{question}", …}'
        )
        raise RecipeError(Problem((given.key,), text))
    for index, row in enumerate(part):
        try:
            given.processing.apply_chat_template(row[name], add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like
            place = given.source.place(index)
            text = f"{given.key}: {place.where}: row {place.number} cannot be written with the chat template ({told(error, 300)})"
            raise RecipeError(Problem((given.key,), text)) from error


def texts(row: Mapping[str, Any], names: Sequence[str], tokenizer: Any) -> list[str]:
    """The prompt of a row, and the prompt with each of its answers; "" for a row without a prompt."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        begun = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return [begun, *(tokenizer.apply_chat_template([*prompt, *row[name]], tokenize=False) for name in names)]
    return [prompt or "", *((prompt or "") + row[name] for name in names)]
