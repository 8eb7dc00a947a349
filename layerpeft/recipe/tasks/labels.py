"""Classes by name: of a cell, of all rows, and those that held-out rows have and no training row does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from layerpeft.errors import Problem, RecipeError
from layerpeft.recipe.reading import Written, text_of
from layerpeft.recipe.rows import Unfit
from layerpeft.text import some

# a number that is measured, not counted: with a point or an exponent
_MEASURED = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")


def measured(label: str) -> bool:
    """Whether a label is a number with a point or an exponent."""
    return bool(_MEASURED.fullmatch(label))


def number(label: str) -> float | None:
    """The number that a label is; None of any other text."""
    try:
        found = float(label)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def name_of(value: Any, declared: tuple[str, ...], what: str = "label") -> str:
    """The name of a class: the text of the cell, so that 1 and "1" are one class. Raises: Unfit."""
    if isinstance(value, dict | list | tuple):
        raise Unfit(f"has {'an object' if isinstance(value, dict) else 'a list'} as {what}, which is one class")
    if value is None or value == "" or (declared and str(value) == "-1"):
        raise Unfit(f"has no {what}")
    try:
        text = text_of(value)
        text.encode()
    except ValueError as error:  # half of a character is one, too
        raise Unfit(f"has no text for {what}: {error}") from None
    if declared and text not in declared:
        if not text.isdecimal() or int(text) >= len(declared):
            raise Unfit(
                f"has the {what} {text}, which is not among those that the data declares: {some([*map(repr, declared)], 40)}"
            )
        return declared[int(text)]
    if isinstance(value, float | Written) and number(text) is None:
        raise Unfit(f"has the {what} {text}, which is no class and no number")
    return text


def ordered(found: Iterable[str], declared: tuple[str, ...], config: Any, first: str = "") -> tuple[str, ...]:
    """Class names in order: that of the data's own declaration, of the checkpoint's head where it has the same names, else `first`,
    whole numbers by size, then the rest by the alphabet."""
    names = set(found)
    if declared:
        return declared
    given = (getattr(config, "id2label", None) or {}).values()
    if set(given) == names:
        return tuple(given)
    return tuple(sorted(names, key=lambda v: (v != first, 0, int(v), v) if v.isdecimal() else (v != first, 1, 0, v)))


def several(held: Iterable[str], declared: tuple[str, ...], config: Any) -> tuple[str, ...]:
    """Class names in order. Raises: RecipeError where there is one only."""
    names = set(held)
    if len(declared or names) < 2:
        text = f"dataset_name: label: the training rows hold one class only ({next(iter(names))!r})"
        raise RecipeError(Problem(("dataset_name",), text))
    return ordered(names, declared, config)


def refuse_strange(key: str, what: str, rows: Iterable[Iterable[str]], known: Mapping[str, int], source: Any) -> None:
    """Raises: RecipeError where rows hold classes that no training row has, with the first row of each (three at most)."""
    strange: dict[str, int] = {}
    for index, names in enumerate(rows):
        for name in names:
            if name not in known:
                strange.setdefault(name, index)
    if strange:
        shown = [f"{name} ({source.place(index).where})" for name, index in list(strange.items())[:3]]
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        text = f"{key}: {what}: held-out rows have classes that no training row has: {', '.join(shown)}{more}"
        raise RecipeError(Problem((key,), text))
