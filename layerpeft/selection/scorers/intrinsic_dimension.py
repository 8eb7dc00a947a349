"""In how many dimensions a layer's outputs lie: the two-nearest-neighbours estimate over a sample of tokens.

With r1 and r2 the distances from a token's state to its nearest and second nearest one, `μ = r2 / r1` follows a law whose only
parameter is the dimension d (TwoNN, Facco et al. 2017, doi 10.1038/s41598-017-11873-y):

- `fit: likelihood`: `d = n / Σ ln μ`;
- `fit: regression`: the slope through the origin of `−ln(1 − F(μ))` over `ln μ`, F the share of tokens with a smaller ratio,
  over the lowest fifth, as LLM-Microscope (arXiv 2502.15007) takes it.

Tokens that coincide with another (the first of every text, where all begin alike) have no ratio and are left out
(LLM-Microscope's code goes on to count them as the lowest ratios). Papers describe layers by this number and choose none to
train by it, so the sign is a choice of yours: a high dimension is trained first, `first: low` turns it.

Costs the forward passes; then 2·tokens²·width operations for every layer. How tokens are drawn says `selection/sampled.py`.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.errors import ScoreError
from layerpeft.selection.sampled import TokenSample
from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.states import First
from layerpeft.selection.typecheck import checked

LOWEST = 5  # the regression takes one token in so many
LEAST = 10  # tokens with a ratio of which something can be said
SAME = 1e-8  # of the mean distance from the centre: nearer states are the same
TRAITS = Traits(units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`tokens`: how many are looked at, at most; `fit`: how the dimension is read off."""

    tokens: int = checked(2048, least=LEAST)
    fit: Literal["likelihood", "regression"] = "likelihood"


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


def ratios(rows: torch.Tensor) -> torch.Tensor:
    """`r2 / r1` of the (tokens, width) that coincide with no other, in ascending order."""
    points = rows.double()
    points = points - points.mean(0)
    points = points / points.norm(dim=-1).mean().clamp(min=torch.finfo(torch.float64).tiny)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(2, largest=False).values
    apart = nearest[:, 0] > SAME
    return (nearest[apart, 1] / nearest[apart, 0]).sort().values


def dimension(rows: torch.Tensor, fit: str = "likelihood") -> float:
    """Of (tokens, width). Raises: ScoreError where too few tokens have a ratio, or all ratios are 1."""
    logs = ratios(rows).log() if len(rows) > 2 else rows.new_zeros(0).double()
    if len(logs) < LEAST or not float(logs.sum()) > 0:
        raise ScoreError(
            f"intrinsic_dimension: of {len(rows)} tokens {len(logs)} differ from all others, and {LEAST} are needed at least, "
            "not all at equal distances; give more batches (num_batches), or longer texts"
        )
    if fit == "likelihood":
        return len(logs) / float(logs.sum())
    count = max(2, len(logs) // LOWEST)
    above = 1 - torch.arange(1, count + 1, dtype=torch.float64) / len(logs)
    logs = logs[:count]
    return float((logs * -above.log()).sum() / logs.square().sum())


class Dimensions(TokenSample):
    """The running measurement: a sample of every layer's outputs."""

    name = "intrinsic_dimension"

    def value(self, rows: torch.Tensor) -> float:
        """The dimension of a layer's sample."""
        return dimension(rows, self.options.fit)


start = Dimensions
