"""What a rule is told when it chooses again during training, and what scores remember from one measurement to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One choice of a schedule. All sequences run over the candidates, in the order of the layers.

    `window`: how many choices came before; `seed`: of this window alone; `keep`: how many to choose (None: the rule decides);
    `scores`: what is known of them by now (zeros for a rule that needs none); `chosen`: positions of the window before;
    `counts`: in how many windows each was chosen; `state`: what the rule gave back last time (plain data, which is saved with
    checkpoints); `base_seed`: of the whole schedule, for what lasts longer than one window.
    """

    window: int
    seed: int
    keep: int | None
    scores: tuple[float, ...]
    chosen: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    base_seed: int = 0


@dataclass(frozen=True)
class Taken:
    """What a rule answers: positions among the candidates, and what it wants to be told next time."""

    positions: tuple[int, ...]
    state: Mapping[str, Any] = field(default_factory=dict)


def window_seed(seed: int, window: int) -> int:
    """The seed of one window, equal in every process and in a run that is resumed; window 0 has the seed itself."""
    if not window:
        return seed
    return int.from_bytes(hashlib.sha256(f"layerpeft window {seed} {window}".encode()).digest()[:6], "big")


def remembered(
    before: Sequence[float | None], seen: Sequence[float | None], how: str, decay: float
) -> tuple[float | None, ...]:
    """Scores after another measurement: `ema` keeps `decay` of what was, others replace it; None where nothing is known."""
    return tuple(
        old if new is None else new if old is None or how != "ema" else decay * old + (1 - decay) * new
        for old, new in zip(before, seen, strict=True)
    )
