"""Salience of weights (SliM-LLM, arXiv 2405.14917): what rounding a weight costs once the others have made up for it.

`Σ_ij w_ij² / c_jj²` over a layer's targets, with `c` the upper Cholesky factor of `H⁻¹` and `H = 2 Σ x xᵀ` over all tokens that
went into the target (GPTQ's Hessian; the paper divides it by the number of texts, one factor for all). `1/c_jj²` is what is left
of input j when the inputs behind it have explained what they can: `R_jj²` in `H = R Rᵀ`, R upper.

The paper gives the most bits to what has the highest salience; as a choice, a high score is trained first. It sums over groups of
128 columns of one matrix and sets bits by group, which no quantizer here takes: HQQ and torchao set them by linear. So the sum is
over the whole linear, and `quant: {per: module, allocation: paired}` moves as many linears up as down; the paper's second half,
scales weighted by salience, is left out for the same reason. `H` is damped by `damp` of its mean diagonal, as where the code
deals out bits (it adds a fixed .01 besides, as a side effect); inputs that are always 0 count nothing.

Costs the forward passes, 2·tokens·in² operations and in² float32 numbers on the CPU for every target (and expert: leave those
out of large models), then the factorization of one such matrix at a time, in³/3 operations in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerpeft.errors import ScoreError
from layerpeft.integrations.torch import widest
from layerpeft.model.layers import Target
from layerpeft.model.weights import in_pieces, matrices
from layerpeft.selection.scorers import OF_TARGETS, Traits, outliers
from layerpeft.selection.scoring import Measured, Request, per_layer

TRAITS = Traits(of_whole=True, units=OF_TARGETS)  # a sum over weights


@dataclass(frozen=True)
class Options:
    """`damp`: what is added to the diagonal of H, as a share of its mean."""

    damp: float = 0.01


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


class Hessians(outliers.InputNorms):
    """The running measurement: `Σ x xᵀ` of each target's inputs, (in, in) per target (and expert), on the CPU."""

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (in, in)."""
        rows = rows.float()
        return (rows.T @ rows).cpu()

    def nothing(self, target: Target) -> torch.Tensor:
        """What a target that saw no token adds."""
        return torch.zeros(target.shape[-1], target.shape[-1])

    def result(self) -> Measured:
        """Salience per layer and per target. Raises: ScoreError when a target saw no input, or one that is not finite."""
        self.refuse_unseen()
        found = {t.name: self._salience(self.request, t) for t in self.request.targets}
        return Measured(tuple(per_layer(self.request.layers, self.request.targets, found)), found)

    def _salience(self, request: Request, target: Target) -> float:
        total = 0.0
        for expert, weight in matrices(request.model, target):
            gram = self.squares.get((target.name, expert))
            if gram is None:  # no token was sent to this expert
                continue
            left = residuals(gram.to(weight.device, widest(weight.device)), self.options.damp)
            if left is None:
                raise ScoreError(f"salience: the inputs of {target.name} are not finite")
            total += sum(float(rows.to(left).square_().sum(0) @ left) for rows in in_pieces(weight))
        return total


start = Hessians


def residuals(gram: torch.Tensor, damp: float) -> torch.Tensor | None:
    """`Σ x xᵀ` (in, in) -> 1/c_jj² (in,), 0 where the input is always 0; None where it cannot be had. Changes `gram`."""
    gram *= 2
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damp * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
    return None if int(failed) else factor.diagonal().flip(0).square().masked_fill(dead, 0)
