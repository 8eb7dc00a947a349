"""The empirical Fisher information of a layer's weights: the mean over batches of their squared gradients, `Σ over its targets
‖G_b‖²`.

That is the trace of the layer's block of `E[g gᵀ]`, g the gradient of the loss of one batch (FIM scores of layers: Lodha et al.,
On Surgical Fine-tuning for Language Encoders, arXiv 2310.17041). With one row a batch these are the gradients of single rows, as
in the definition; with more, squares of their mean, smaller by up to the number of rows. Higher means "the loss depends on it
more": train first.

Not shared with the published code: gradients of the logit in the place of its log-probability, and the Frobenius norm of the
diagonal tensor by tensor, for which a whole copy of the model would have to be held (the trace takes none). Cost: one forward and
one backward pass over each batch, with the gradient probe of `gradient_norm`: `k` directions, or `exact`.
"""

from dataclasses import dataclass
from typing import Literal

from layerpeft.selection.scorers import OF_HEADS, Traits, gradient_norm
from layerpeft.selection.scoring import Measured, Request, per_layer
from layerpeft.selection.typecheck import checked

TRAITS = Traits(units=OF_HEADS)


@dataclass(frozen=True)
class Options:
    """`reduce`: the `mean` over a layer's weights, so that layers of different sizes compare, or the `sum` (the trace).

    `exact`, `k`: as of `gradient_norm`.
    """

    reduce: Literal["mean", "sum"] = "mean"
    exact: bool = False
    k: int = checked(8, least=1, of={"exact": (False,)})


def needs(options: Options) -> str:
    """Forward and backward passes over batches with labels."""
    return "backward"


class Fisher(gradient_norm.GradientNorm):
    """The running measurement: a probe on every target."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, gradient_norm.Options(exact=options.exact, k=options.k))
        self.reduce = options.reduce

    def result(self) -> Measured:
        """Mean squares per layer and per target. Raises: as `gradient_norm`."""
        found, targets = super().result(), self.request.targets
        sizes = {t.name: float(t.params) if self.reduce == "mean" else 1.0 for t in targets}
        whole = per_layer(self.request.layers, targets, sizes) if self.reduce == "mean" else [1.0] * len(found.values)
        values = tuple((v or 0.0) ** 2 / n if n else 0.0 for v, n in zip(found.values, whole, strict=True))
        return Measured(values, {name: v**2 / sizes[name] for name, v in found.targets.items()})


start = Fisher
