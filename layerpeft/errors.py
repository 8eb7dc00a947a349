"""Every error that layerpeft raises on purpose, the problems that they are made of, and what makes their messages useful."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

MOST = 200  # problems that one message lists


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `path`: the keys down to it, outermost first; `text`: a sentence, which names the last of them."""

    path: tuple[str, ...]
    text: str

    def under(self, *path: str) -> Problem:
        """The same, seen from further out."""
        return Problem((*path, *self.path), self.text)

    def __str__(self) -> str:
        return self.text


class LayerpeftError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback (exit code 2).
    It is made of sentences, problems, and errors from deeper down; its message is made of them, and never read back."""

    def __init__(self, *items: str | Problem | LayerpeftError, title: str = "") -> None:
        self.title = title
        self.items = tuple(Problem((), item) if isinstance(item, str) else item for item in items)
        lines = [str(item) for item in self.items]
        start = f"{title}: " if title else ""
        more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
        several = "\n".join([f"{start}{len(lines)} problems", *(f"  - {line}" for line in lines[:MOST] + more)])
        super().__init__(several if len(lines) > 1 else start + "".join(lines))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong, one by one."""
        return tuple(p for item in self.items for p in (item.problems if isinstance(item, LayerpeftError) else [item]))

    def listed(self) -> tuple[Problem, ...]:
        """The problems as they stand in a longer list: a lone one with its title."""
        found = self.problems
        return (Problem(found[0].path, str(self)),) if len(found) == 1 else found

    def under(self, *path: str) -> Self:
        """The same error with the keys of its problems seen from further out."""
        return type(self)(*(item.under(*path) for item in self.items), title=self.title)


class LayerMapError(LayerpeftError):
    """The model has no repeated blocks, or more than one stack fits the request."""


class ScoreError(LayerpeftError):
    """A score is missing, not finite, or belongs to another architecture."""


class NothingSeenError(ScoreError):
    """There is nothing in these batches to learn a score from: no label, or the layers did not run."""


class SelectionError(LayerpeftError):
    """A choice of layers that cannot be made as asked."""


class ConfigError(LayerpeftError):
    """A config whose options contradict each other or the model."""


class RecipeError(LayerpeftError):
    """A recipe with unknown keys, wrong types or impossible combinations."""


class UsageError(LayerpeftError):
    """A command line that cannot be read."""


class ElsewhereError(LayerpeftError):
    """Another of several processes cannot go on, and says why."""


class SaveError(LayerpeftError):
    """A saved folder that is incomplete, truncated or altered."""


class ExportError(LayerpeftError):
    """What was trained is nothing that a server takes."""


class QuantizationError(LayerpeftError):
    """A linear that is not stored in the precision that was asked for."""


class TrainingError(LayerpeftError):
    """What trained is not what was asked for."""


class Problems:
    """Collects every problem of one request, so that all of them are reported in a single message."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.items: list[Problem | LayerpeftError] = []

    def add(self, text: str, *path: str) -> None:
        """A sentence, and the keys down to what it is about."""
        self.items.append(Problem(path, text))

    def absorb(self, error: LayerpeftError, *path: str) -> None:
        """An error from deeper down with its problems, which lie below the keys of `path` here."""
        self.items.append(error.under(*path))

    def raise_if_any(self, error: type[LayerpeftError]) -> None:
        """Raises: `error`, with one line per problem, when there is at least one."""
        if self.items:
            raise error(*self.items, title=self.title)


def nearest(name: object, allowed: Iterable[str]) -> str | None:
    """The allowed name that looks most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None


def hint(name: object, allowed: Iterable[str], form: str = " Did you mean {!r}?") -> str:
    """The nearest name as a question, to stand behind a sentence; nothing where none is close."""
    close = nearest(name, allowed)
    return form.format(close) if close else ""


def unknown(what: str, name: object, allowed: Iterable[str]) -> str:
    """One sentence for an unknown name: what was given, the nearest name, what is allowed."""
    names = sorted(set(allowed))
    return f"unknown {what} {name!r}.{hint(name, names)} Allowed: {', '.join(names)}."


def raise_faults(title: str, faults: Iterable[str]) -> None:
    """Raises: TrainingError naming all of them; nothing where there are none."""
    problems = Problems(title)
    for fault in faults:
        problems.add(fault)
    problems.raise_if_any(TrainingError)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two records say otherwise, key by key."""
    keys = [k for k in {**then, **now} if then.get(k) != now.get(k)]
    return [f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in keys]


# ---- exceptions of other libraries ----------------------------------------------------------------------------------
# They hold nothing but a sentence: here, and nowhere else, one is read.


def told(error: BaseException, most: int | None = None) -> str:
    """What it says, on one line of at most so many characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what it says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def mentions(error: BaseException, text: str, *, word: bool = True) -> bool:
    """Whether it says this, as a `word` of its own or as any part of its text."""
    return bool(re.search(rf"\b{re.escape(text)}\b", str(error))) if word else text in str(error)
