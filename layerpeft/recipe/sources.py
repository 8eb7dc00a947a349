"""Which rows a recipe names: one data set, several with weights, or a share of the training rows that is held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layerpeft.errors import Problems, RecipeError, unknown
from layerpeft.selection.typecheck import Setting, complaint

_KEYS = {
    "path": Setting(str | list[str]),
    "weight": Setting(float | None),
    "split": Setting(str | None),
    "config": Setting(str | None),
}
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
EXAMPLE = "dataset_name: [{path: a.jsonl, weight: 0.7}, {path: b.jsonl, weight: 0.3}]"


@dataclass(frozen=True)
class Named:
    """One data set: a file, a folder, a name on the hub, files of one kind. `weight`: its part of an epoch, beside the others'."""

    path: str | list[str]
    weight: float | None = None
    split: str | None = None
    config: str | None = None


def share_of(value: Any) -> float | None:
    """The part of the training rows that "5%" means; None of anything else. Raises: RecipeError where that is none or all."""
    found = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    if not 0 < float(found[1]) < 100:
        raise RecipeError(
            f"{value!r} leaves no rows on one side; a share is above 0% and below 100%, as in eval_dataset: 5%"
        )
    return float(found[1]) / 100


def several(value: Any) -> bool:
    """Whether data sets are told apart; a list of files alone is one data set."""
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def named(value: Any, weighs: bool = True) -> tuple[Named, ...]:
    """The data sets that a value means; none of a share. `weighs`: they may have weights. Raises: RecipeError, all at once."""
    if value is None or share_of(value) is not None:
        return ()
    if not several(value):
        return (Named(value),)
    problems = Problems("")
    found = []
    for number, item in enumerate(value, 1):
        given = {"path": item} if isinstance(item, str) else dict(item)
        place = f"number {number} of the list"
        for key in given:
            if key not in _KEYS:
                problems.add(f"{place}: {unknown('key', key, _KEYS)}")
            elif wrong := complaint(_KEYS[key], given[key]):
                problems.add(f"{place}: {key}: {wrong}")
        weight = given.get("weight")
        if isinstance(weight, int | float) and not weight > 0:
            problems.add(f"{place}: weight: expected a number above 0, got {weight}")
        if weight is not None and not weighs:
            problems.add(f"{place}: weight: held-out rows are measured once each; take it out")
        if "path" not in given:
            problems.add(f"{place}: path: missing, as in `{EXAMPLE}`")
        found.append({key: given[key] for key in _KEYS if key in given})
    if len({item.get("weight") is None for item in found}) > 1:
        problems.add(
            "weight: some data sets have one and others none; give one to each, or to none (then each row comes once)"
        )
    problems.raise_if_any(RecipeError)
    return tuple(Named(**item) for item in found)


def renamed(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every path in it changed."""
    if isinstance(value, str):
        return value if _SHARE.fullmatch(value) else change(value)
    if isinstance(value, list):
        return [renamed(item, change) for item in value]
    if isinstance(value, Mapping) and "path" in value:
        return {**value, "path": renamed(value["path"], change)}
    return value


def paths(value: Any) -> list[str]:
    """Every path in a value that may be a wrong one."""
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, list):
        return [path for item in value for path in paths(item)]
    return [value] if isinstance(value, str) and not _SHARE.fullmatch(value) else []
