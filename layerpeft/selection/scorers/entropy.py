"""Entropy of a layer's output activations (LUQ, arXiv 2509.23729): into how many kinds of states a layer sorts the tokens.

The block's outputs for a sample of tokens are clustered by k-means; the score is the entropy of the clusters' sizes,
`-Σ n_i/N · log(n_i/N)`, in nats, between 0 and log(clusters). LUQ gives the fewest bits to the layers with the lowest.

The `tokens` are drawn as `selection/sampled.py` says. Not in the paper's text: how tokens are sampled, and k-means++ as the start.
Costs the forward passes; then 2·tokens·clusters·width operations for every layer and round of k-means (a few dozen).
"""

from dataclasses import dataclass

import torch

from layerpeft.selection.sampled import TokenSample
from layerpeft.selection.scorers import OF_STATES, STATES, Traits

ROUNDS = 100  # of k-means, which mostly stands still after a few dozen
TRAITS = Traits(units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options:
    """`clusters`: of k-means; `tokens`: how many are clustered, at most."""

    clusters: int = 100
    tokens: int = 2048


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


class Activations(TokenSample):
    """The running measurement: a sample of every layer's outputs."""

    name, doing = "entropy", "cluster"

    def value(self, rows: torch.Tensor) -> float:
        """The entropy of a layer's clusters, in nats."""
        return size_entropy(cluster_sizes(rows, self.options.clusters, self.request.seed))


start = Activations


def cluster_sizes(rows: torch.Tensor, clusters: int, seed: int = 0) -> list[int]:
    """Sizes of the clusters that k-means (Lloyd's, started by k-means++ from the seed) finds in (tokens, width)."""
    points = rows.double()
    points = points - points.mean(0)
    generator = torch.Generator().manual_seed(seed)
    squares = points.square().sum(1)
    centres = _spread_out(points, squares, min(clusters, points.shape[0]), generator)
    nearest = torch.full((points.shape[0],), -1)
    for _ in range(ROUNDS):
        # distances without the points' own squares, which are the same for all
        found = (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)
        if torch.equal(found, nearest):
            break
        nearest = found
        sizes = torch.bincount(nearest, minlength=centres.shape[0])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        # an empty one stays where it is
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
    return torch.bincount(nearest, minlength=centres.shape[0]).tolist()


def size_entropy(sizes: list[int]) -> float:
    """Entropy of a histogram, in nats; empty clusters do not count."""
    shares = torch.tensor([s for s in sizes if s], dtype=torch.float64) / sum(sizes)
    return abs(float(-(shares * shares.log()).sum()))


def _spread_out(points: torch.Tensor, squares: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each further centre is a point drawn with weights of its squared distance to the ones there are."""
    chosen = [int(torch.randint(points.shape[0], (), generator=generator))]
    best = torch.full_like(squares, torch.inf)
    while len(chosen) < count:
        last = points[chosen[-1]]
        best = torch.minimum(best, (squares - 2 * points @ last + squares[chosen[-1]]).clamp(min=0))
        best[chosen[-1]] = 0
        if not float(best.sum()):  # fewer kinds of points than clusters
            break
        chosen.append(int(torch.multinomial(best, 1, generator=generator)))
    return points[chosen].clone()
