"""How little a layer's outputs are alike to its inputs: `1 − CKA` between what enters and what leaves, over samples.

CKA-LoRA (arXiv 2602.05988) takes linear CKA (Kornblith et al., arXiv 1905.00414) at the last token of 128 texts and trains the
half of the layers where it is lowest. So a high score is trained first, as with `influence`; `first: low` turns the sign.

`CKA = Σ HSIC(K, L) / √(Σ HSIC(K, K) · Σ HSIC(L, L))`, `K = X Xᵀ`, `L = Y Yᵀ` over the samples of one group, sums over groups of
`samples` of them (minibatch CKA, Nguyen et al., arXiv 2010.15327). `hsic: unbiased` (Song et al.'s estimator, its formula 3)
does not depend on the size of the groups; `biased` is `tr(K H L H)/(n − 1)²`, which is high for few samples of many features
whatever the layer does. States that do not differ between samples (the same last token at the lowest layer) are alike only to
such.

Costs the forward passes, and 4·samples·width operations per sample and layer; `pool: last` has one sample per text. Groups are
filled over batches: 2·samples·width numbers of every layer lie on the CPU.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.scoring import Request
from layerpeft.selection.states import First, Passage, RowSums
from layerpeft.selection.typecheck import checked

LEAST = 4  # samples that the unbiased estimate needs
TRAITS = Traits(units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`hsic`: the estimate; `pool`: a text's last token, its mean, or `all` tokens as samples; `samples`: of a group."""

    hsic: Literal["unbiased", "biased"] = "unbiased"
    pool: Literal["last", "mean", "all"] = "last"
    samples: int = checked(128, least=LEAST)


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


def hsics(x: torch.Tensor, y: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """HSIC(K, L), HSIC(K, K), HSIC(L, L) of (samples, features) each, in float64."""
    kernels = [_kernel(x, unbiased), _kernel(y, unbiased)]
    return torch.stack([_hsic(kernels[i], kernels[j], unbiased) for i, j in ((0, 1), (0, 0), (1, 1))])


def cka(sums: torch.Tensor) -> float:
    """From the sums of `hsics`; 1 where neither side varies, 0 where one does."""
    both, left, right = sums.tolist()
    if left > 0 and right > 0:
        return both / (left * right) ** 0.5
    return float(left <= 0 and right <= 0)


class Alignment(RowSums):
    """The running measurement: what enters and what leaves every layer, side by side, until a group is full."""

    name, what, least = "cka", "texts", LEAST

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        self.size = options.samples
        self.what = "tokens" if options.pool == "all" else "texts"

    def rows(self, passage: Passage) -> torch.Tensor:
        """(samples, 2·width)."""
        return torch.cat([passage.pooled(s, self.options.pool) for s in (passage.before, passage.after)], -1)

    def close(self, rows: torch.Tensor) -> torch.Tensor:
        """The three HSIC of a group."""
        x, y = rows.double().chunk(2, -1)
        return hsics(x, y, self.options.hsic == "unbiased")

    def value(self, sums: torch.Tensor) -> float:
        """1 − CKA."""
        return 1 - cka(sums)


start = Alignment


def _kernel(x: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """(samples, samples), of centred features, which change neither estimate; zero where samples differ by rounding alone."""
    x = x.double()
    centred = x - x.mean(0)
    if float(centred.norm()) <= 1e-6 * float(x.norm()):
        return x.new_zeros(len(x), len(x))
    kernel = centred @ centred.T
    return kernel.fill_diagonal_(0) if unbiased else kernel


def _hsic(k: torch.Tensor, l: torch.Tensor, unbiased: bool) -> torch.Tensor:  # noqa: E741
    n = len(k)
    if not unbiased:
        return (k * l).sum() / (n - 1) ** 2
    ones = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    return ((k * l).sum() + ones) / (n * (n - 3))
