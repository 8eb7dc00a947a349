"""Signal-to-noise ratio of the weights (Spectrum, arXiv 2406.06623); no data needed.

Per weight, from its singular values S: `sigma = IQR(S) / 1.349`, `eps = sigma · (1 + sqrt(β))` with β the smaller over
the larger size, `SNR = ΣS above eps / ΣS up to eps` (over 1 where none is), divided by the largest S. Spectrum ranks
within one type of module, since the ratios of different shapes lie orders of magnitude apart, and may train other
layers for every type: `unit: target` with `within: kind` (it rounds the number down, `keep` half up). Where a layer is
one unit, `across: rank` takes the mean over its targets of the share of the type's other weights that lie lower (0 to
1), `across: mean` the mean of the ratios themselves, which the types with the largest ratios decide. Despite its name
no Marchenko-Pastur test: sigma is the spread of the singular values, not the noise of an element, so pure noise in a
wide matrix counts as all signal. Not shared: infinite ratios, head and embedding that always train, and full training
where a name does not match.

Costs the singular values of every weight, O(out · in · min(out, in)), with two float32 copies of one in memory at a time.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.model.layers import Target
from layerpeft.model.weights import matrices
from layerpeft.selection.scorers import OF_TARGETS, Traits
from layerpeft.selection.scoring import Measured, Request

TRAITS = Traits(units=OF_TARGETS)


@dataclass(frozen=True)
class Options:
    """`across`: how the ratios of a layer's targets become one number."""

    across: Literal["rank", "mean"] = "rank"


def needs(options: Options) -> str:
    """The weights alone."""
    return "weights"


def score(request: Request, options: Options) -> Measured:
    """Numbers per layer (0 where a layer holds no target), and the ratio of every target."""
    ratios = {t.name: target_ratio(request, t) for t in request.targets}
    types: dict[str, list[float]] = {}
    for target in request.targets:
        types.setdefault(_type(request, target), []).append(ratios[target.name])
    values = []
    for layer in range(len(request.layers)):
        parts = [
            ratios[t.name] if options.across == "mean" else _place(ratios[t.name], types[_type(request, t)])
            for t in request.targets
            if t.layer == layer
        ]
        values.append(sum(parts) / len(parts) if parts else 0.0)
    return Measured(tuple(values), ratios)


def ratio(singular: torch.Tensor, shape: tuple[int, int]) -> float:
    """SNR / S_max of one weight of `shape` from its singular values; 0 for a weight of zeros."""
    s = singular.double().cpu()
    largest = float(s.max())
    if not largest:
        return 0.0
    upper, lower = torch.quantile(s, torch.tensor([0.75, 0.25], dtype=s.dtype)).tolist()
    eps = (upper - lower) / 1.349 * (1 + (min(shape) / max(shape)) ** 0.5)
    above = s > eps
    noise = float(s[~above].sum()) or 1.0
    return float(s[above].sum()) / noise / largest


def target_ratio(request: Request, target: Target) -> float:
    """The ratio of a target's weight (out, in; kernels flattened), or the mean over its experts."""
    found = [
        ratio(torch.linalg.svdvals(weight.float()), (weight.shape[0], weight.shape[1]))
        for _, weight in matrices(request.model, target)
    ]
    return sum(found) / len(found)


def _type(request: Request, target: Target) -> str:
    """Its name inside of its layer, such as `self_attn.q_proj`."""
    return request.layers.place(target.name, target.layer)


def _place(mine: float, alike: list[float]) -> float:
    """The share of the other weights of a type that are lower; ties count half, and a weight alone is in the middle."""
    if len(alike) == 1:
        return 0.5
    return (sum((r < mine) + 0.5 * (r == mine) for r in alike) - 0.5) / (len(alike) - 1)
