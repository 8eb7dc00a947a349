"""Bytes of what a trainer holds beside the model that trains, and when: over the pass itself, or before it begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, told
from layerpeft.integrations.tracing import as_traced, unpacked_rows
from layerpeft.model.layers import base_of
from layerpeft.planning.beside import Beside, Other
from layerpeft.planning.trace import Pass, Step, count, counting
from layerpeft.text import size_text

COPIES = 3  # of a token's logits, in float32, when the next is read: as given, as chosen from, and as probabilities


@dataclass(frozen=True)
class Held:
    """Bytes beside the model. `teaching`: over its own pass; `before`: at the highest, of what is over when that begins; `lines`:
    which part is what, in words."""

    weights: int = 0
    teaching: int = 0
    before: int = 0
    lines: tuple[str, ...] = ()

    def on(self, one: Pass) -> Pass:
        """A pass of the model with what is there beside it."""
        return Pass(max(one.peak + self.teaching, self.before), one.flops)


def held(model: nn.Module, rows: int, length: int, step: Step) -> Held:
    """What `step.beside` takes where `rows` rows of `length` tokens are trained on. The model has no storage.
    Raises: ConfigError where it cannot write answers so."""
    beside: Beside | None = step.beside
    if beside is None:
        return Held()
    lines, teaching, before = [], 0, 0
    for other in beside.others:
        size = passed(other, rows, length, step)
        teaching, before = (teaching + size, before) if other.teaches else (teaching, max(before, size))
        when = "while the model's activations are there" if other.teaches else "before the pass"
        said = f"weights {size_text(other.weights)}, its pass over {other.rows * rows} rows {size_text(size)}"
        lines.append(f"{other.name}: {said}, {when}")
    if beside.writing is not None:
        tokens, many = min(beside.writing.tokens, length - 1), rows * beside.writing.rows
        cache, logits, highest = written(model, many, length - tokens, tokens, step)
        before = max(before, highest)
        lines.append(
            f"answers, {many} of {tokens} tokens at once: keys and values {size_text(cache)}, logits {size_text(logits)}, "
            f"{size_text(highest)} at the highest, before the pass"
        )
    return Held(sum(other.weights for other in beside.others), teaching, before, tuple(lines))


def passed(other: Other, rows: int, length: int, step: Step) -> int:
    """Bytes at the highest of a forward pass of another model without a way back, its logits included."""
    model = other.model.eval()
    with as_traced(model), torch.no_grad(), _alone(model, step):
        ids = torch.zeros(rows * other.rows, length, dtype=torch.long)
        return count(lambda: model(input_ids=ids, use_cache=False), model, (ids,)).peak


def written(model: Any, rows: int, prompt: int, tokens: int, step: Step) -> tuple[int, int, int]:
    """Bytes of keys and values when `tokens` tokens are written after `prompt` ones, of a token's logits, and at the highest.

    The highest is that of reading the prompts, or of writing the last token.
    Raises: ConfigError for a model that cannot be read so.
    """
    training = model.training
    model.eval()
    try:
        with as_traced(model), torch.no_grad(), _alone(model, step):
            reading, _, _ = _read(model, rows, prompt, 0)
            _, last, (cache, vocabulary) = _read(model, rows, prompt + tokens - 1, 1)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(
            f"plan counts answers of a language model; {type(base_of(model)).__name__}: {told(error, 200)}"
        ) from error
    finally:
        model.train(training)
    logits = COPIES * 4 * rows * vocabulary
    return cache, logits, max(reading, last + logits)


def _read(model: Any, rows: int, tokens: int, more: int) -> tuple[int, int, tuple[int, int]]:
    """Peaks of reading so many tokens, and `more` after them from their cache; bytes of that, and the size of the vocabulary."""
    takes = inspect.signature(base_of(model).forward).parameters
    given: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})
    ids = torch.zeros(rows, tokens + more, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = int(rows == 1)  # prompts are padded to the longest
    with counting(model, (ids, mask)) as live:
        said = model(input_ids=ids[:, :tokens], attention_mask=mask[:, :tokens], **given)
        live.mark(("last", 0))
        if more:
            said = model(input_ids=ids[:, tokens:], attention_mask=mask, past_key_values=said.past_key_values, **given)
        live.mark(("end", 0))
        cache = sum(t.numel() * t.element_size() for t in _cached(said.past_key_values))
    return live.parts[0].peak, live.parts[1].peak, (cache, said.logits.shape[-1])


def _cached(cache: Any) -> list[torch.Tensor]:
    """Keys and values of all layers."""
    pairs = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
    return [t for pair in pairs for t in pair if t is not None]


@contextmanager
def _alone(model: nn.Module, step: Step) -> Iterator[None]:
    """Rows of one text each, in the types that training computes in."""
    kind = next(model.parameters()).device.type
    with unpacked_rows(), torch.autocast(kind, step.autocast) if step.autocast else nullcontext():
        yield
