"""The layer's place: higher is closer to the output. LayRA is LoRA on `first:10+last:2`, Telly full weights on `last:N`.
Costs nothing."""

from layerpeft.selection.picks import NoOptions as Options
from layerpeft.selection.scorers import OF_HEADS, Traits
from layerpeft.selection.scoring import Measured, Request

TRAITS = Traits(units=OF_HEADS)


def needs(options: Options) -> str:
    """Nothing: no weight is read, no batch is run."""
    return "nothing"


def score(request: Request, options: Options) -> Measured:
    """The layer's index."""
    return Measured(tuple(float(i) for i in range(len(request.layers))))
