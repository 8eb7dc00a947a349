"""`prefix_cache`, parsed: where what enters the lowest trained layer is kept, how much of it, and how."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerpeft.errors import ConfigError, Problem, Problems, hint, unknown
from layerpeft.text import no_size, size_of
from layerpeft.training.prefix.folders import default_root

WAYS = 'null, memory, disk, a size on disk ("20GB"), a folder, or {where: …, limit: 20GB, bits: 8}'
KEYS, PLACES = ("where", "limit", "bits"), ("memory", "disk")


@dataclass(frozen=True)
class Setting:
    """`where`: "memory", "disk" (the user's cache folder) or a folder; `limit`: bytes, at most (None: half of what is free);
    `bits`: 8 for a scale per token and a byte per number, None for states as they are."""

    where: str = "memory"
    limit: int | None = None
    bits: int | None = None

    @classmethod
    def parse(cls, value: Any) -> Setting:
        """From the value of a recipe's key. Raises: ConfigError naming every problem."""
        given = dict(value) if isinstance(value, Mapping) else {"where": value}
        problems = Problems("prefix_cache")
        for key in (k for k in given if k not in KEYS):
            problems.add(unknown("prefix_cache", key, KEYS), "prefix_cache")
        where, limit, bits = (given.get(k) for k in KEYS)
        if isinstance(where, str) and (size := size_of(where)) is not None:
            where, limit = "disk", size if limit is None else limit
        if not isinstance(where, str) or not where.strip():
            problems.add(f"prefix_cache={value!r} is none of: {WAYS}", "prefix_cache")
        elif where not in PLACES and not _is_path(where):
            sentence = (
                f"prefix_cache={where!r} is none of: {WAYS}.{hint(where, PLACES)} A folder is written as './{where}'"
            )
            problems.add(sentence, "prefix_cache")
        if limit is not None and not (limit := size_of(limit)):
            problems.add(f"limit: {no_size(given['limit'])}", "prefix_cache")
        if bits is not None and (bits != 8 or isinstance(bits, bool)):
            problems.add(f"bits={bits!r} is not 8, or null for states as they are", "prefix_cache")
        problems.raise_if_any(ConfigError)
        return cls(str(where), limit, bits)

    @property
    def root(self) -> Path:
        """The folder of those that lie on disk."""
        return default_root() if self.where == "disk" else Path(self.where).expanduser()

    def plain(self) -> str | dict[str, Any]:
        """As a recipe writes it."""
        found = {k: v for k, v in asdict(self).items() if v is not None}
        return self.where if len(found) == 1 else found


def placed(value: Any, found: Callable[[str], str]) -> Any:
    """The same, with the whole path of a folder that is named from some place; `found`: from which."""
    if isinstance(value, Mapping):
        return {k: placed(v, found) if k == "where" else v for k, v in value.items()}
    if not isinstance(value, str) or not _is_path(value) or size_of(value) is not None:
        return value
    return str(Path(found(value)).expanduser().absolute())


def parse_lower(value: Any) -> bool:
    """Whether blocks below the lowest trained layer train as they are (`on`, the default) or are in evaluation mode (`off`; False).

    Raises: ConfigError.
    """
    if value in (None, True, "on"):
        return True
    if value is False or value == "off":
        return False
    raise ConfigError(Problem(("lower_dropout",), f"lower_dropout={value!r} is none of: on, off"))


def _is_path(where: str) -> bool:
    return "/" in where or os.sep in where or where.startswith("~")
