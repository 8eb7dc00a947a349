"""Lists of beginnings of parameters' names, literal or as regular expressions, as a choice of layers and modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCKS = "layers|layer|blocks|block|h"  # what holds the repeated blocks of a model
_PLACE = re.compile(rf"(?P<before>(?:.*\.)?(?:{BLOCKS})\.)(?P<number>[^.]+)(?P<tail>(?:\..*)?)", re.S)
_LITERAL = re.compile(r"[\w.]*")
_ROWS = re.compile(r".+\[[0-9]*(?::[0-9]*)?\]", re.S)  # [34] too, which is row 34 there
_ENDS = ("weight", "bias")


@dataclass(frozen=True)
class Choice:
    """`select`, `target_modules` (None: whole layers) and `modules_to_save`; `select` is None where no layer is named at all."""

    select: Any
    target_modules: list[str] | str | None
    modules_to_save: tuple[str, ...]


def place_of(pattern: str) -> re.Match[str] | None:
    """A pattern in its parts: what stands before the number of a layer, the number, and what follows; None outside of layers."""
    return _PLACE.fullmatch(pattern.removeprefix("^"))


def choice(patterns: Sequence[str], literal: bool = False) -> Choice:
    """What trains where every parameter does whose name begins with one of these, as `re.match` reads them, a point for a point.

    `literal`: they are text. Raises: ValueError for rows of a tensor, and for patterns that may lie outside of layers.
    """
    inside: list[str] = []
    always: dict[str, None] = {}
    for given in patterns:
        pattern = given if literal else given.replace("\\.", ".")
        if not literal and _ROWS.fullmatch(pattern):
            raise ValueError(f"{given!r} names rows of a tensor, and tensors train whole here; take the rows off")
        if place_of(pattern):
            inside.append(pattern)
        elif _LITERAL.fullmatch(name := pattern.removeprefix("^").removesuffix("$")):
            always[_module(name)] = None
        else:
            raise ValueError(
                f"{given!r} names no layer by its number; name what lies outside of layers, as in {'lm_head.weight'!r}"
            )
    if not inside:
        return Choice(None, None, tuple(always))
    return Choice(*(_by_name(inside) or _by_pattern(inside, literal)), tuple(always))


def _module(name: str) -> str:
    """The module of a parameter; what is a module already stays."""
    head, _, last = name.rstrip(".").rpartition(".")
    return head if last in _ENDS and head else name.rstrip(".")


def _by_name(patterns: Sequence[str]) -> tuple[Any, list[str] | None] | None:
    """Whole layers, or modules of layers, by number and name; None where some are patterns, or both kinds stand together."""
    tails: dict[int, dict[str, None]] = {}
    full: list[str] = []
    for pattern in patterns:
        found = place_of(pattern.removesuffix("$"))
        if found is None or not found["number"].isdecimal() or not _LITERAL.fullmatch(found["before"] + found["tail"]):
            return None
        whole = found["tail"] == "."
        if not whole and (not found["tail"].strip(".") or pattern.endswith("$") and not _is_parameter(found["tail"])):
            return None  # layers.1 begins the names of layers 10 to 19, too
        tails.setdefault(int(found["number"]), {})[found["tail"].strip(".")] = None
        full.append(f"{found['before']}{found['number']}{found['tail']}".rstrip("."))
    kinds = {"" in names for names in tails.values()}
    if len(kinds) > 1 or kinds == {True} and any(len(names) > 1 for names in tails.values()):
        return None
    if kinds == {True}:
        return sorted(tails), None
    same = {tuple(sorted(names)) for names in tails.values()}
    return sorted(tails), list(next(iter(tails.values()))) if len(same) == 1 else list(dict.fromkeys(full))


def _is_parameter(tail: str) -> bool:
    return tail.rpartition(".")[2] in _ENDS


def _by_pattern(patterns: Sequence[str], literal: bool) -> tuple[Any, str]:
    """One regular expression over the names of modules and parameters, wherever in the layers they lie."""
    parts = []
    for pattern in patterns:
        text = pattern.removeprefix("^")
        if literal:
            parts.append(f"{re.escape(text)}.*")
            continue
        ends = text.endswith("$")
        body = re.sub(r"\.(?!\+)", r"\\.", text.removesuffix("$"))
        only = r"(?=.*\.(?:weight|bias)$)" if ends and not _is_parameter(text.removesuffix("$")) else ""
        parts.append(f"{only}{body}" if ends else f"{body}.*")
    return "all", parts[0] if len(parts) == 1 else "|".join(f"(?:{part})" for part in parts)
