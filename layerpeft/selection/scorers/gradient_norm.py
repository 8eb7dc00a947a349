"""Norm of the gradient of the base weights, by layer: `sqrt(mean over batches of Σ over the layer's targets ‖G_b‖²)`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.errors import NothingSeenError, ScoreError
from layerpeft.model.targets import is_routed, leave_out
from layerpeft.model.weights import squared_norm
from layerpeft.selection.probe import Exact, Probe, Sketch
from layerpeft.selection.scoring import Measured, Request, per_layer
from layerpeft.text import some


@dataclass(frozen=True)
class Options:
    """`exact`: form each target's gradient, one at a time, instead of estimating its norm from `k` random directions.

    `normalize`: `none`; `numel` (root mean square); `weight` (‖g‖/‖θ‖, surgical fine-tuning, arXiv 2210.11466).
    `signal`: the norm of the *mean* gradient over batches, another statistic than the mean of the squared norms.
    """

    exact: bool = False
    k: int = 8
    normalize: Literal["none", "numel", "weight"] = "none"
    signal: bool = False


def needs(options: Options) -> str:
    """Forward and backward passes over batches with labels."""
    return "backward"


class GradientNorm:
    """The running measurement: a probe on every target."""

    def __init__(self, request: Request, options: Options) -> None:
        self.request, self.options = request, options
        how = Exact() if options.exact else Sketch(options.k, request.seed)
        self.probe = Probe({t.name: t for t in request.targets}, how, signal=options.signal, skip_bad=request.live)
        self._sums: dict[str, float] | None = None
        self.next_batch, self.detach = self.probe.next_batch, self.probe.detach

    @property
    def batches(self) -> int:
        """Batches whose backward pass has been seen."""
        return self.probe.batches

    def attach(self) -> None:
        """Puts the probe on the model."""
        self.probe.attach(self.request.model)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums squared norms and batch counts over processes, in the order of the targets.

        Raises: ScoreError for `signal`, whose gradients are not sent around.
        """
        if self.options.signal:
            raise ScoreError(
                "signal: true works in one process only; leave it out, or score beforehand with score_layers"
            )
        names = [t.name for t in self.request.targets]
        unknown = float(not self.probe.scales_known)
        counts = torch.tensor([float(self.probe.batches), *(float(n in self.probe.reached) for n in names), unknown])
        *counts, unknown = add(counts).tolist()
        mine = self.probe.sums(unscaled=not unknown)
        squares = add(torch.tensor([mine.get(n, 0.0) for n in names], dtype=torch.float64))
        self.probe.reached = {n for n, c in zip(names, counts[1:], strict=True) if c}
        self._sums = dict(zip(names, (squares / counts[0]).tolist(), strict=True))

    def result(self) -> Measured:
        """Norms per layer and per target. Raises: ScoreError when a target was never reached by a backward pass."""
        unreached = [t.name for t in self.request.targets if t.name not in self.probe.reached and not is_routed(t.name)]
        if unreached:
            kind = ScoreError if self.probe.reached else NothingSeenError
            raise kind(
                f"{len(unreached)} target(s) got no gradient: {some(unreached)}. "
                "The model uses their weights without calling them, or the loss does not depend on them; "
                f"leave them out of target_modules: {leave_out(unreached, self.probe.reached)}"
            )
        # of the mean gradient, the batches are divided out before the square
        count = self.probe.batches ** (2 if self.options.signal else 1)
        sums = self._sums or {n: s / count for n, s in self.probe.sums().items()}
        if not any(sums.values()):
            raise NothingSeenError(
                "all gradients are exactly zero: the loss does not depend on these layers, or all labels are ignored"
            )
        targets, layers = self.request.targets, self.request.layers
        squares = per_layer(layers, targets, sums)
        if self.options.normalize == "numel":
            sizes = per_layer(layers, targets, {t.name: float(t.params) for t in targets})
            squares = [s / n if n else 0.0 for s, n in zip(squares, sizes, strict=True)]
        elif self.options.normalize == "weight":
            weights = per_layer(layers, targets, {t.name: squared_norm(self.request.model, t) for t in targets})
            squares = [s / w if w else 0.0 for s, w in zip(squares, weights, strict=True)]
        return Measured(tuple(s**0.5 for s in squares), {n: v**0.5 for n, v in sums.items()})


start = GradientNorm
