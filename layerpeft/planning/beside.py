"""What a trainer holds beside the model that trains: a teacher, models that reward, answers while they are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Other:
    """A model that only says something of the rows. `model`: without storage; `rows`: how many it reads at once, for each that
    is trained on; `teaches`: its logits are there together with what the trained model keeps, else its pass is over by then."""

    name: str
    model: Any = field(repr=False)
    weights: int
    teaches: bool
    rows: int = 1


@dataclass(frozen=True)
class Writing:
    """Answers of `tokens` tokens that the model itself writes before a pass; `rows` at once for each row that is trained on."""

    tokens: int
    rows: int = 1


@dataclass(frozen=True)
class Beside:
    """All that is there besides, as a recipe's trainer has it."""

    others: tuple[Other, ...] = ()
    writing: Writing | None = None
