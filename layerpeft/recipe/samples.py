"""A few words from the model, before and after: prompts from held-out rows, answers without any randomness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.engines.generating import generating

ANSWERS = ("before", "after")  # fields that the model has written
SILENT = "the model wrote nothing"


@dataclass(frozen=True)
class Sample:
    """A prompt, what the rows say comes next, and what the model says."""

    prompt: str
    wanted: str
    before: str = ""
    after: str = ""


def prompt_of(row: Mapping[str, Any], text_field: str = "text") -> tuple[Any, str] | None:
    """The prompt of a row (text, or chat messages) and the text that should follow; None for rows that show neither."""
    if "prompt" in row and "completion" in row:
        wanted = row["completion"]
        return row["prompt"], wanted if isinstance(wanted, str) else str(wanted[-1].get("content") or "")
    messages = row.get("messages") or row.get("conversations")
    if messages and messages[-1].get("role") == "assistant":
        return messages[:-1], str(messages[-1].get("content") or "")
    if isinstance(row.get(text_field), str):
        words = row[text_field].split(" ")
        half = max(1, len(words) // 2)
        return " ".join(words[:half]), " ".join(words[half:])
    return None


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Any, prompt: Any, tokens: int) -> str:
    """At most `tokens` tokens after a prompt, the likeliest each; the model is left in the mode it was in."""
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    device = next(model.parameters()).device
    inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    training = model.training
    model.eval()
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    try:
        with generating(model):
            found = model.generate(**inputs, **options)  # type: ignore[operator]
    finally:
        model.train(training)
    return tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def show(prompt: Any) -> str:
    """A prompt as text."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
