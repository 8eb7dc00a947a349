"""A recipe in the making: what another tool's file says, what of it became what, and what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerpeft.errors import Problems, hint
from layerpeft.recipe.yaml import flow

LONGEST = 60  # characters of a value in a comment
NO_TRAINER = "no trainer of this version"
SECRET = ("token", "api_key", "password", "secret")


@dataclass(frozen=True)
class Given:
    """A file of another tool: its keys, the folder it lies in, and the model whose architecture may be looked at (else the file's
    own). `out`: the folder of the recipe."""

    data: Mapping[str, Any]
    home: Path
    model: str | None = None
    out: Path = Path()


@dataclass
class Draft:
    """What a recipe will say. `top`, `block`: its keys, and those of its block; `notes`: what stands beside them, by key (of the
    block: `layerpeft.key`); `left`: keys of theirs that it does not say, each with the reason; `empty`: keys of theirs without a
    value; `read`: those that others were read with; `problems`: what decides what trains, and cannot be carried."""

    given: Given
    tool: str
    trainer: str = ""
    method: str = ""
    top: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    problems: Problems = field(default_factory=lambda: Problems("import"))

    def get(self, key: str, default: Any = None) -> Any:
        """What their file says, and that it was read; the default where nothing stands there."""
        self.read.add(key)
        value = self.given.data.get(key)
        return default if value is None else value

    def name(self, key: str, default: str | None = None) -> str | None:
        """The same for a key that takes a name: text, whatever stands there."""
        value = self.get(key, default)
        return value if value is None or isinstance(value, str) else flow(value)

    def put(self, key: str, value: Any, why: str = "") -> None:
        """Writes a key of the top level, with what it comes from; what another key of theirs has said stays."""
        self._write(self.top, key, key, value, why)

    def inside(self, key: str, value: Any, why: str = "") -> None:
        """Writes a key of the block."""
        self._write(self.block, key, f"layerpeft.{key}", value, why)

    def _write(self, place: dict[str, Any], key: str, shown: str, value: Any, why: str) -> None:
        if key in place and place[key] != value:
            self.leave(why.partition(":")[0] or key, f"{shown} is {flow(place[key])} already")
            return
        place[key] = value
        self.note(shown, why)

    def note(self, key: str, text: str) -> None:
        """Says something beside a key."""
        if text and text not in self.notes.setdefault(key, []):
            self.notes[key].append(text)

    def leave(self, key: str, why: str, value: Any = None) -> None:
        """Says that a key of theirs was left out, with its value and the reason."""
        value = self.given.data.get(key) if value is None else value
        self.left.append((key if value is None else f"{key}: {shown(key, value)}", why))

    def refuse(self, key: str, why: str) -> None:
        """Notes what keeps the recipe from being written, since another choice would train."""
        self.problems.add(f"{key}: {why}", key)

    def refuse_name(self, key: str, value: str, what: str, allowed: Iterable[str]) -> None:
        """The same of a name that is none of those that are `allowed`."""
        names = list(allowed)
        self.refuse(key, f"{value!r} is {what}; there are {', '.join(names)}.{hint(value, names)}")


def shown(key: str, value: Any) -> str:
    """A value in a comment: short, and no secret."""
    if any(word in key.lower() for word in SECRET) and isinstance(value, str):
        return "…"
    text = flow(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def said(key: str, value: Any, new: Any = None) -> str:
    """A key of theirs with its value, as a comment says where something comes from; without it where `new` is the same."""
    return key if type(value) is type(new) and value == new else f"{key}: {shown(key, value)}"


def flag(value: Any) -> bool:
    """Whether a switch is on, as any of the tools writes it."""
    return value.strip().lower() in ("true", "yes", "on", "1") if isinstance(value, str) else bool(value)


def number(value: Any) -> int | float | None:
    """A number, as text too; None of anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | float) else None


def whole(value: Any) -> int | None:
    """A whole number; None of anything else."""
    found = number(value)
    return found if isinstance(found, int) else None


def words(value: Any) -> list[str]:
    """Names, from a list or text with commas or spaces."""
    if isinstance(value, str):
        return [word for part in value.split(",") for word in part.split()]
    return [str(item) for item in value] if isinstance(value, list) else []
