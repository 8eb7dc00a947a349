"""How text is generated, as `key=value` of transformers' GenerationConfig and a seed: looked at before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from layerpeft.errors import Problems, UsageError, told, unknown
from layerpeft.recipe.yaml import Document, override

MOST = 256  # new tokens, where nobody says how many
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_LARGEST = 10**9  # of what is counted: more than anybody means
_WHOLE = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "num_beams": 1, "top_k": 0}
_NUMBERS = {"temperature": math.inf, "repetition_penalty": math.inf, "top_p": 1, "min_p": 1, "typical_p": 1}
# what changes the kind of what comes back, and not the text
_OTHER = (
    "return_dict_in_generate", "num_return_sequences", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What `generate` is told over the model's own generation_config; `seed`: of draws."""

    given: Mapping[str, Any]
    seed: int | None = None

    @property
    def streams(self) -> bool:
        """Whether text comes word by word: of several beams it is known at the end."""
        return self.given.get("num_beams") in (None, 1)

    def for_model(self, model: Any) -> dict[str, Any]:
        """Keywords for `model.generate`. Drawing is on where an option of drawing is given; a temperature of 0 is no drawing."""
        found = dict(self.given)
        if "do_sample" not in found and set(SAMPLING) & set(found):
            found["do_sample"] = found.get("temperature") != 0
        if found.get("temperature") == 0:
            del found["temperature"]
        own = getattr(model, "generation_config", None)
        if not {"max_new_tokens", "max_length"} & set(found) and getattr(own, "max_new_tokens", None) is None:
            found["max_new_tokens"] = MOST
        return found


def drawing_none(options: Options) -> Options:
    """The likeliest token each, unless an option says otherwise."""
    if "do_sample" in options.given or set(SAMPLING) & set(options.given):
        return options
    return Options({**options.given, "do_sample": False}, options.seed)


def of_training(options: Options, values: Mapping[str, Any]) -> Options:
    """With the length and the beams by which training generated (its `values`), where nothing else is said."""
    told = {"max_length": values.get("generation_max_length"), "num_beams": values.get("generation_num_beams")}
    if {"max_new_tokens", "max_length"} & set(options.given):
        del told["max_length"]
    return Options({**{k: v for k, v in told.items() if v is not None}, **options.given}, options.seed)


def _wanted(name: str, value: Any) -> str | None:
    """What a number should have been; None of one that may be so."""
    if name in _WHOLE and not (type(value) is int and _WHOLE[name] <= value <= _LARGEST):
        return f"a whole number from {_WHOLE[name]} to {_LARGEST:,}"
    if name in _NUMBERS and not (type(value) in (int, float) and math.isfinite(value) and 0 <= value <= _NUMBERS[name]):
        most = _NUMBERS[name]
        return "a number that is not below zero" if math.isinf(most) else f"a number from 0 to {most}"
    return "a finite number" if type(value) is float and not math.isfinite(value) else None


def read_options(settings: Sequence[str]) -> Options:
    """Options as they stand on a command line. Raises: UsageError naming every one that is unknown or cannot be."""
    document = override(Document(), settings)
    problems = Problems("generation")
    for fault in document.faults:
        problems.add(fault.text)
    known = {k for k in vars(GenerationConfig()) if not k.startswith("_")} - {*_OTHER, "transformers_version"}
    given = {k: v for k, v in document.data.items() if v is not None}
    for name in [name for name in given if name not in known and name != "seed"]:
        problems.add(unknown("option", name, {*known, "seed"}))
    seed = given.pop("seed", None)
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**32):
        problems.add(f"seed: expected a whole number from 0, got {seed!r}")
    for name, value in given.items():
        if wanted := _wanted(name, value):
            problems.add(f"{name}: expected {wanted}, got {value!r}")
    try:
        if not problems.items:
            drawn = {k: v for k, v in given.items() if (k, v) != ("temperature", 0)}
            GenerationConfig(**drawn).validate()
    except (ValueError, TypeError) as error:
        problems.add(told(error, 300))
    problems.raise_if_any(UsageError)
    return Options(given, seed)
