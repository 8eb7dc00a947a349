"""How heavy the tail of a layer's spectra is (heavy-tailed self-regularization; AlphaPruning, arXiv 2410.10912); no data needed.

Per weight, from the eigenvalues λ of WᵀW in ascending order: `α = 1 + k / Σ(ln λ_i - ln λ_min)` over the k of the tail that
begins at λ_min (the estimator of Hill, 1975). `tail` says where that is: at the `median` (the upper half, PL_Alpha_Hill), at the
`peak` (of a histogram of log λ with 100 bins; among the eigenvalues from 0.95 to 1.5 times of it, the start with the least
Kolmogorov-Smirnov distance), or at the `best` start of all. A layer's α is the mean over its weights, as published. Low α: a
heavy tail, a well trained layer. What follows from that is not settled: the same school gives higher learning rates to high α
(TempBalance, arXiv 2312.00359), others train the outlier-rich layers more; so `first` says it.

α depends on the shape of a weight. `form: averaged` takes the spectra of equal windows instead (FARMS, arXiv 2506.06280):
`places` times `places` of them, `window` rows and twice as many columns, evenly laid over the weight, all eigenvalues as one
spectrum.

Not shared with the published code: logarithms of zero (eigenvalues that are zero to working precision are left out), a lower
bound of the peak in log10 that is compared with λ, windows that are wider than the weight. As there, weights with fewer than five
eigenvalues have no tail. Cost: the singular values of every weight, O(out · in ·
min(out, in)); two float32 copies of a weight are in memory at a time, of a window with `averaged`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.errors import ScoreError
from layerpeft.model.layers import Target
from layerpeft.model.weights import matrices
from layerpeft.selection.scorers import OF_TARGETS, Traits
from layerpeft.selection.scoring import Measured, Request
from layerpeft.selection.typecheck import checked
from layerpeft.text import some

TRAITS = Traits(units=OF_TARGETS)

FEWEST = 5  # eigenvalues that make a spectrum
BINS = 100
ASPECT = 2  # columns of a window over its rows


@dataclass(frozen=True)
class Options:
    """`first`: what comes first, `light` tails (the score is α) or `heavy` ones (1 / (α - 1), the mean of ln λ/λ_min)."""

    first: Literal["light", "heavy"] = "light"
    tail: Literal["median", "peak", "best"] = "median"
    form: Literal["published", "averaged"] = "published"
    window: int = checked(100, least=1, of={"form": ("averaged",)})
    places: int = checked(10, least=1, of={"form": ("averaged",)})


def needs(options: Options) -> str:
    """The weights alone."""
    return "weights"


def score(request: Request, options: Options) -> Measured:
    """Numbers per layer (0 where a layer holds no target), and the α of every target that has one.

    Raises: ScoreError for a layer of which no weight has a tail.
    """
    found = {t.name: alpha for t in request.targets if (alpha := _target_alpha(request, t, options)) is not None}
    held: dict[int, list[float]] = {}
    for target in request.targets:
        held.setdefault(target.layer, []).extend([found[target.name]] if target.name in found else [])
    without = [request.layers.names[i] for i, parts in held.items() if not parts]
    if without:
        raise ScoreError(
            f"heavy_tail: no weight of {some(without)} has a tail: fewer than {FEWEST} eigenvalues that are not zero, or all "
            "of them equal. Leave these layers out (exclude), or choose by another scorer"
        )
    alphas = {i: sum(parts) / len(parts) for i, parts in held.items()}
    if options.first == "heavy":
        alphas = {i: 1 / (alpha - 1) for i, alpha in alphas.items()}
    return Measured(tuple(alphas.get(i, 0.0) for i in range(len(request.layers))), found)


def exponent(eigenvalues: torch.Tensor, tail: str = "median") -> float | None:
    """α of a spectrum; None where it has no tail."""
    x = eigenvalues.double().flatten().cpu().sort().values
    x = x[x > float(x[-1]) * (len(x) * torch.finfo(torch.float32).eps) ** 2] if len(x) else x
    if len(x) < FEWEST:
        return None
    logs = x.log()
    starts = torch.arange(len(x) - 1)
    if tail == "median":
        starts = torch.tensor([len(x) // 2])
    elif tail == "peak":
        starts = _near_peak(x)
    sizes = len(x) - starts
    sums = logs.flip(0).cumsum(0).flip(0)[starts] - sizes * logs[starts]  # over a tail, of ln λ - ln λ_min
    alive = sums > 1e-12 * sizes
    fits = [(start, 1 + float(n / s)) for start, n, s in zip(starts[alive].tolist(), sizes[alive], sums[alive])]
    if not fits:
        return None
    return fits[0][1] if len(fits) == 1 else min((_distance(x[i:], alpha), alpha) for i, alpha in fits)[1]


def _near_peak(x: torch.Tensor) -> torch.Tensor:
    """Where tails may begin that begin at the peak of the histogram of log λ."""
    low, high = math.log10(x[0]), math.log10(x[-1])
    counts = torch.histc(x.log10(), BINS, low, high)
    peak = 10 ** (low + (high - low) * int(counts.argmax()) / BINS)
    near = ((x[:-1] >= 0.95 * peak) & (x[:-1] <= 1.5 * peak)).nonzero().flatten()
    return near if len(near) else (x[:-1] >= peak * (1 - 1e-9)).nonzero().flatten()[:1]


def _distance(tail: torch.Tensor, alpha: float) -> float:
    """The largest difference between a tail's distribution and that of the power law (Kolmogorov-Smirnov)."""
    law = 1 - (tail / tail[0]) ** (1 - alpha)
    return float((law - torch.arange(len(tail)) / len(tail)).abs().max())


def _target_alpha(request: Request, target: Target, options: Options) -> float | None:
    """Of a target's weight (out, in; kernels flattened), or the mean over its experts."""
    found = []
    for _, weight in matrices(request.model, target):
        pieces = [weight] if options.form == "published" else _windows(weight, options)
        spectrum = torch.cat([torch.linalg.svdvals(piece.float()).square() for piece in pieces])
        alpha = exponent(spectrum, options.tail)
        found += [alpha] if alpha is not None else []
    return sum(found) / len(found) if found else None


def _windows(weight: torch.Tensor, options: Options) -> Iterator[torch.Tensor]:
    """Windows of one shape, as large as fits, evenly laid over a weight."""
    rows = max(1, min(options.window, weight.shape[0], weight.shape[1] // ASPECT))
    columns = min(rows * ASPECT, weight.shape[1])
    for top in _evenly(weight.shape[0] - rows, options.places):
        for left in _evenly(weight.shape[1] - columns, options.places):
            yield weight[top : top + rows, left : left + columns]


def _evenly(last: int, count: int) -> list[int]:
    """Up to `count` different whole numbers from 0 to `last`."""
    return sorted({round(last * i / max(1, count - 1)) for i in range(count)})
