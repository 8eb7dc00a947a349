"""How long and how fast a recipe trains that nobody has said it of: by how many rows there are, and how wide the model is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

STEPS = 100  # at least, as far as EPOCHS allow: in fewer a schedule has hardly begun
EPOCHS = (3, 20)
BATCHES = (8, 4, 2, 1)
WIDTH = 2000  # of a model that learns best at RATE; wider ones at smaller rates
RATE, RATE_OF_PAIRS = 5e-4, 5e-5  # of LoRA, where answers are learned, and where they are weighed against others
POWER = 0.781
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Pace:
    """`steps`: of the whole training."""

    epochs: int
    batch: int
    rate: float
    steps: int

    @property
    def logging(self) -> int:
        """Steps between two losses that are written down: ten of them at least."""
        return max(1, min(10, self.steps // 10))


def pace(rows: int, width: int | None, alone: bool) -> Pace:
    """For so many training rows and a model of so many numbers a token (None: not known). `alone`: answers are learned as such.

    Few rows come more often and fewer at a time, so that a small file is learned and not merely seen. The rate falls with the width
    as the best one of LoRA was found to (Schulman et al., LoRA Without Regret, 2025), within a factor of four.
    """
    batch = next(size for size in BATCHES if size == 1 or rows >= 8 * size)
    a_round = max(1, math.ceil(rows / batch))
    least, most = EPOCHS
    epochs = max(least, min(most, math.ceil(STEPS / a_round)))
    factor = min(4.0, max(0.25, (WIDTH / (width or WIDTH)) ** POWER))
    rate = float(f"{(RATE if alone else RATE_OF_PAIRS) * factor:.0e}")
    return Pace(epochs, batch, rate, epochs * a_round)


def width_of(config: Any) -> int | None:
    """How many numbers a model has of a token, as its config says."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in WIDTHS)
    return next((width for width in found if isinstance(width, int) and width > 0), None)
