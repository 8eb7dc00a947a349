"""Whether held-out rows are held out: how many of them are among those that train."""

from __future__ import annotations

from typing import Any

from layerpeft.recipe.gathered import digest
from layerpeft.recipe.trainer import Setup

WORDS = ("string", "large_string", "bool")


def trained_on(setup: Setup) -> int | None:
    """How many held-out rows train as well, word for word and with the same answer; None of rows that are not all words and whole
    numbers (pictures, sounds), through which nobody looks."""
    train, held_out = setup.train, setup.held_out
    assert held_out is not None
    names = sorted({*train.column_names} & {*held_out.column_names})
    if not names or not all(_written(part.features[name]) for part in (train, held_out) for name in names):
        return None
    known = {digest(row) for row in train.select_columns(names)}
    return sum(digest(row) in known for row in held_out.select_columns(names))


def _written(feature: Any, inside: bool = False) -> bool:
    """Whether this is text or whole numbers, or lists and mappings of them; one other number is an answer."""
    if isinstance(feature, dict):
        return all(_written(part, True) for part in feature.values())
    if isinstance(feature, list):
        return all(_written(part, True) for part in feature)
    if (part := getattr(feature, "feature", None)) is not None:
        return _written(part, True)
    kind = str(getattr(feature, "dtype", ""))
    return kind in WORDS or "int" in kind or not inside and kind.startswith("float")
