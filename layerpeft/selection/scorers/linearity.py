"""How far a layer is from a linear map of its input: `1 − linearity` over the real tokens, between 0 and 1.

`linearity = 1 − min over A of ‖X̃ A − Ỹ‖²_F`, X̃ and Ỹ (tokens, width) what enters and what leaves, centred and of Frobenius
norm 1 (Razzhigaev et al., "Your Transformer is Secretly Linear", arXiv 2405.12250; LLM-Microscope, arXiv 2502.15007). `of:
change` takes `Y − X` for Y, which leaves the residual stream out, as the papers' second figure does.

The papers find that the most linear layers can be removed or replaced by a linear map at little cost: what is left is what a
layer does itself. So the least linear one is trained first; `first: low` turns the sign.

The least squares are solved from sums over tokens in float64, so any number of batches is one problem; it needs more tokens
than the width, since a linear map fits fewer exactly. Costs the forward passes, and 4·width² operations per token and layer;
2·width² float64 numbers of every layer lie on the CPU.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.errors import ScoreError
from layerpeft.integrations.torch import widest
from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.states import First, LayerSums, Passage

SMALLEST = 1e-12  # of the largest eigenvalue: directions below it hold rounding alone
TRAITS = Traits(units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`of`: what a linear map is to give, the layer's `output` or the `change` that it makes."""

    of: Literal["output", "change"] = "output"


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


class Fit(LayerSums):
    """The running measurement: tokens, Σx, Σy, Σ‖y‖², Σ x xᵀ and Σ x yᵀ of every layer."""

    def part(self, passage: Passage) -> torch.Tensor:
        """(2 + 2·width + 2·width²,) of one run."""
        x, y = (passage.tokens(s).to(widest(s.device)) for s in (passage.before, passage.after))
        y = y - x if self.options.of == "change" else y
        parts = [x.new_tensor([len(x)]), y.square().sum()[None], x.sum(0), y.sum(0), x.T @ x, x.T @ y]
        return torch.cat([part.flatten() for part in parts])

    def value(self, sums: torch.Tensor) -> float:
        """The share of Y that no linear map of X gives. Raises: ScoreError for too few tokens."""
        count, energy, width = int(sums[0]), sums[1], int(((2 * len(sums) - 3) ** 0.5 - 1) / 2)
        if count <= width + 1:
            raise ScoreError(
                f"linearity: a linear map fits {count} tokens of width {width} exactly; give more than {width + 1} in all "
                "(num_batches, or longer texts)"
            )
        x, y, rest = sums[2 : 2 + width], sums[2 + width : 2 + 2 * width], sums[2 + 2 * width :]
        xx = rest[: width**2].view(width, width) - x.outer(x) / count
        xy = rest[width**2 :].view(width, width) - x.outer(y) / count
        total = float(energy - y @ y / count)
        if total <= SMALLEST * float(energy):
            return 0.0
        values, vectors = torch.linalg.eigh(xx)
        seen = values > SMALLEST * values[-1]
        fitted = (vectors[:, seen].T @ xy).square().sum(1) / values[seen]
        return min(1.0, max(0.0, 1 - float(fitted.sum()) / total))


start = Fit
