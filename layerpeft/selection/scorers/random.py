"""Uniform random numbers: the control arm that every other criterion has to beat. Costs nothing."""

import random

from layerpeft.selection.picks import NoOptions as Options
from layerpeft.selection.scorers import OF_HEADS, Traits
from layerpeft.selection.scoring import Measured, Request

TRAITS = Traits(units=OF_HEADS)


def needs(options: Options) -> str:
    """Nothing: no weight is read, no batch is run."""
    return "nothing"


def score(request: Request, options: Options) -> Measured:
    """One draw from (0, 1] per layer, from a generator of its own."""
    generator = random.Random(f"layerpeft random {request.seed}")
    return Measured(tuple(1.0 - generator.random() for _ in range(len(request.layers))))
