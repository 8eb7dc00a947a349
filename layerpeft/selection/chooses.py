"""What configs share that choose layers: a choice that is parsed once, and batches that are used at run time and never written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

from layerpeft.selection.scores import Scores
from layerpeft.selection.select import Select

COPIED = (dict, list)  # forms of a field that may be changed where they are
Parsed = TypeVar("Parsed")


class Chooses:
    """Beside a dataclass with the field `select` and the InitVar `batches`; both may be read and set at any time."""

    select: Any
    _batches: Iterable[Any] | None

    @property
    def choosing(self) -> Select:
        """`select`, parsed. Raises: SelectionError."""
        return self._parsed("select", Select.parse)

    def with_batches(self, batches: Iterable[Any] | None) -> Self:
        """A copy that carries these batches."""
        twin = copy.deepcopy(self)
        twin._batches = batches
        return twin

    def _parsed(self, name: str, parse: Callable[[Any], Parsed]) -> Parsed:
        """What a field means: parsed once, and anew where something else stands there by now."""
        value, kept = getattr(self, name), vars(self).get(f"_parsed_{name}")
        if kept is not None and (kept[0] is value or (type(kept[0]) is type(value) in COPIED and kept[0] == value)):
            return kept[1]
        found = parse(value)
        vars(self)[f"_parsed_{name}"] = (copy.copy(value) if type(value) in COPIED else value, found)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        for name, value in vars(self).items():
            shared = name == "_batches" or name.startswith("_parsed_") or isinstance(value, Select | Scores)
            vars(twin)[name] = value if shared else copy.deepcopy(value, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_batches": None}
