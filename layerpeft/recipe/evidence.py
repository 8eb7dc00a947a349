"""What the shipped experiment (`benchmarks/evidence`) found out about choices of layers: the numbers that advice rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
FILE = Path(__file__).parent / "data" / "evidence.json"


Span = tuple[float, float, float]


@dataclass(frozen=True)
class Criterion:
    """A way to score layers. `select`: as a recipe writes it; `alone` and `sets`: rank correlation with what layers bring alone,
    and in sets, as mean, low and high end of a 95 % interval over `cells` pairs of a model and a task."""

    name: str
    select: Mapping[str, Any]
    alone: Span
    sets: Span
    cells: int


@dataclass(frozen=True)
class Kept:
    """How much of what training all layers gains on held-out rows a rule's choice gained: mean, least and most over `cells`.
    `steps`: at as many steps, `time`: in as much time."""

    rule: str
    steps: Span
    time: Span
    cells: int


@dataclass(frozen=True)
class Tried:
    """The same of a method at its best rate, in parts of what LoRA on all layers gains."""

    name: str
    steps: Span
    time: Span
    cells: int


@dataclass(frozen=True)
class Evidence:
    """`criteria`: those that were judged together; `kept`: by rule; `methods`: beside each other; `source`: which models
    and tasks, in words."""

    criteria: tuple[Criterion, ...]
    kept: tuple[Kept, ...]
    methods: tuple[Tried, ...]
    source: str

    def of(self, rule: str) -> Kept | None:
        """What is known of a rule."""
        return next((one for one in self.kept if one.rule == rule), None)


@cache
def evidence() -> Evidence:
    """As it ships."""
    data = json.loads(FILE.read_text(encoding="utf-8"))

    def rows(kind: type[T], name: str) -> tuple[T, ...]:
        lists = ({k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in data[name])
        return tuple(kind(**row) for row in lists)

    return Evidence(rows(Criterion, "criteria"), rows(Kept, "kept"), rows(Tried, "methods"), data["source"])
