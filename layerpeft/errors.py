"""Every error that layerpeft raises on purpose, and the two helpers that make their messages useful."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class LayerpeftError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback (exit code 2)."""


class LayerMapError(LayerpeftError):
    """The model has no repeated blocks, or more than one stack fits the request."""


class ScoreError(LayerpeftError):
    """A score is missing, not finite, or belongs to another architecture."""


class SelectionError(LayerpeftError):
    """A choice of layers that cannot be made as asked."""


class ConfigError(LayerpeftError):
    """A config whose options contradict each other or the model."""


class RecipeError(LayerpeftError):
    """A recipe with unknown keys, wrong types or impossible combinations."""


class SaveError(LayerpeftError):
    """A saved folder that is incomplete, truncated or altered."""


class QuantizationError(LayerpeftError):
    """A linear that is not stored in the precision that was asked for."""


class TrainingError(LayerpeftError):
    """What trained is not what was asked for."""


class Problems:
    """Collects every problem of one request, so that all of them are reported in a single message."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.items: list[str] = []

    def add(self, text: str) -> None:
        self.items.append(text)

    def raise_if_any(self, error: type[LayerpeftError]) -> None:
        """Raises: `error`, with one line per problem, when there is at least one."""
        if len(self.items) == 1:
            raise error(f"{self.title}: {self.items[0]}")
        if self.items:
            lines = "\n".join(f"  - {item}" for item in self.items)
            raise error(f"{self.title}: {len(self.items)} problems\n{lines}")


def nearest(name: object, allowed: Iterable[str]) -> str | None:
    """The allowed name that looks most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, name: object, allowed: Iterable[str]) -> str:
    """One sentence for an unknown name: what was given, the nearest name, what is allowed."""
    names = sorted(allowed)
    close = nearest(name, names)
    hint = f" Did you mean {close!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Allowed: {', '.join(names)}."


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
