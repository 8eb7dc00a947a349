"""The gradients of the base weights, by layer: `sqrt(mean over batches of Σ over the layer's targets ‖G_b‖²)`, or another
statistic.

Higher means "train this first" for each of them:

- `frobenius`, the default, is that norm;
- `nuclear`: mean over batches of Σ over targets of the sum of G's singular values (Li et al., What happened in LLMs layers when
  trained for fast vs. slow thinking, arXiv 2410.23743), from the k strongest directions that the probe finds, so never too high;
  by how much it may be too low at most stands in the scores' `origin` as `error`, a share of every layer's score. `exact` leaves
  no error;
- `l1`: mean over batches of Σ|G_ij|, exact, a block of rows at a time;
- `norms`: mean over batches of Σ over targets of ‖G‖ (Aletheia, arXiv 2604.15351), exact, one gradient at a time. A layer of more
  targets has more of it;
- `agreement`: 1 - mean over elements of |mean over batches of g| / rms over batches of g. So layers come first whose batches
  disagree most, which in this package's pilot bring most when they train alone (rank correlation .93; the signal-to-noise ratio
  of whole layers says nothing). `4k` rows of every weight are looked at; takes at least two batches. A statistic of this package;
- `credit`: what the adapters of a layer, of rank `k`, did for the loss in a short run on all layers (`selection/credit.py`). Below
  0: they worked against it.

Cost: one forward and one backward pass over each batch and, per target, two products with 2k columns (`frobenius`, `nuclear`),
one with 4k (`agreement`), or one as large as the backward pass's own (`l1`, `norms`, `exact`). No gradient of a weight is kept.
`credit`: one forward pass over each batch, and `steps` forward and backward passes with adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from layerpeft.errors import NothingSeenError, Problems, ScoreError
from layerpeft.model.targets import is_routed, leave_out
from layerpeft.model.weights import squared_norm
from layerpeft.selection.credit import Credit
from layerpeft.selection.overlaps import overlaps_for
from layerpeft.selection.probe import Exact, Probe, Sketch, Statistic
from layerpeft.selection.scorers import OF_HEADS, Traits
from layerpeft.selection.scoring import Measured, Request, over, per_layer, per_weight
from layerpeft.selection.statistics import Absolute, Agreement, Norm, Nuclear, Running
from layerpeft.selection.typecheck import checked
from layerpeft.text import some

TRAITS = Traits(overlaps=True, units=OF_HEADS)


@dataclass(frozen=True)
class Options:
    """`exact`: form each target's gradient, one at a time, instead of estimating from `k` random directions.

    `normalize`: `none`; `numel` (root mean square, with `l1` the mean); `weight` (‖g‖/‖θ‖, surgical fine-tuning, arXiv
    2210.11466). `signal`: the norm of the *mean* gradient over batches, another statistic than the mean of the squared norms.
    """

    exact: bool = False
    k: int = checked(8, least=1, of={"statistic": ("frobenius", "nuclear", "agreement", "credit"), "exact": (False,)})
    normalize: Literal["none", "numel", "weight"] = "none"
    signal: bool = False
    statistic: Literal["frobenius", "nuclear", "l1", "norms", "agreement", "credit"] = "frobenius"
    steps: int = checked(20, least=1, of={"statistic": ("credit",)})
    lr: float = checked(1e-3, above=0, of={"statistic": ("credit",)})

    def __post_init__(self) -> None:
        """Raises: ScoreError for options that do not go together."""
        problems, named = Problems("gradient_norm"), f"statistic: {self.statistic}"
        if self.signal and self.statistic != "frobenius":
            problems.add(f"signal: true is of statistic: frobenius, not of {named}", "signal")
        if self.signal and self.exact:
            problems.add(
                "signal: true adds gradients up over batches and cannot be exact without holding them all", "signal"
            )
        if self.exact and self.statistic == "agreement":
            problems.add(f"exact: true would hold two gradients of every weight; with {named} raise k", "exact")
        if self.exact and self.statistic == "credit":
            problems.add(f"exact: true is not of {named}, which forms no gradient of a weight", "exact")
        if self.exact and self.statistic in ("l1", "norms"):
            problems.add(f"exact: true: {named} is exact as it is; take it out", "exact")
        fits = {"frobenius": ("none", "numel", "weight"), "l1": ("none", "numel")}.get(self.statistic, ("none",))
        if self.normalize not in fits:
            problems.add(f"normalize: {self.normalize} is not of {named}; write {' or '.join(fits)}", "normalize")
        problems.raise_if_any(ScoreError)

    @property
    def least_batches(self) -> int:
        """How many there must be to compare."""
        return 2 if self.statistic == "agreement" else 1

    @property
    def only_before(self) -> str:
        """Why it cannot be measured while training."""
        return "statistic: credit trains for some steps of its own before the layers are wrapped" * (
            self.statistic == "credit"
        )

    def how(self, seed: int) -> Statistic:
        """What the probe takes of each gradient."""
        if self.statistic == "agreement":
            return Agreement(self.k, seed)
        if self.statistic == "l1":
            return Absolute()
        if self.statistic == "norms":
            return Norm()
        if self.statistic == "nuclear":
            return Nuclear(self.k, seed, self.exact)
        return Exact() if self.exact else Running(self.k, seed) if self.signal else Sketch(self.k, seed)


def needs(options: Options) -> str:
    """Forward and backward passes over batches with labels; `credit` runs those by itself."""
    return "forward" if options.statistic == "credit" else "backward"


class GradientNorm:
    """The running measurement: a probe on every target."""

    def __init__(self, request: Request, options: Options) -> None:
        self.request, self.options = request, options
        self.overlaps = overlaps_for(request)
        saw = self.overlaps.see if self.overlaps is not None else None
        targets = {t.name: t for t in request.targets}
        self.probe = Probe(targets, options.how(request.seed), skip_bad=request.live, also=saw)
        self._sums: dict[str, float] | None = None
        self._left: dict[str, float] | None = None
        self.detach = self.probe.detach

    @property
    def batches(self) -> int:
        """Batches whose backward pass has been seen."""
        return self.probe.batches

    def next_batch(self, scale: float | None = None) -> None:
        """Closes the running batch."""
        before = self.batches
        self.probe.next_batch(scale)
        if self.overlaps is not None:
            self.overlaps.next_batch(counts=self.batches > before)

    def attach(self) -> None:
        """Puts the probe on the model."""
        self.probe.attach(self.request.model)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums the statistic and batch counts over processes, in the order of the targets.

        Raises: ScoreError for `signal` and `agreement`, whose gradients are not sent around.
        """
        if not self.probe.how.whole:
            asked = "signal: true" if self.options.signal else f"statistic: {self.options.statistic}"
            raise ScoreError(f"{asked} works in one process only; leave it out, or score beforehand with score_layers")
        names = [t.name for t in self.request.targets]
        unknown = float(not self.probe.scales_known)
        counts = torch.tensor([float(self.probe.batches), *(float(n in self.probe.reached) for n in names), unknown])
        *counts, unknown = add(counts).tolist()
        mine, left = self.probe.sums(unscaled=not unknown), self._error(not unknown)
        both = torch.tensor([[part.get(n, 0.0) for n in names] for part in (mine, left)], dtype=torch.float64)
        sums, left = (both_ / counts[0] for both_ in add(both))
        self.probe.reached = {n for n, c in zip(names, counts[1:], strict=True) if c}
        self._sums = dict(zip(names, sums.tolist(), strict=True))
        self._left = dict(zip(names, left.tolist(), strict=True))
        if self.overlaps is not None:
            self.overlaps.combine(add)

    def result(self) -> Measured:
        """Numbers per layer and per target. Raises: ScoreError when a target was never reached by a backward pass."""
        found = self._result()
        return found if self.overlaps is None else replace(found, overlaps=self.overlaps.result())

    def _result(self) -> Measured:
        refuse_unreached(self.request, self.probe.reached)
        targets, layers = self.request.targets, self.request.layers
        if self.options.statistic == "agreement":
            return self._disagreement()
        sums = self._sums or self.probe.sums(batches=self.probe.batches)
        if not any(sums.values()):
            raise NothingSeenError(
                "all gradients are exactly zero: the loss does not depend on these layers, or all labels are ignored"
            )
        values = per_layer(layers, targets, sums)
        if self.options.normalize == "numel":
            values = per_weight(layers, targets, sums)
        elif self.options.normalize == "weight":
            weights = per_layer(layers, targets, {t.name: squared_norm(self.request.model, t) for t in targets})
            values = over(values, weights)
        if self.options.statistic == "frobenius":
            return Measured(tuple(s**0.5 for s in values), {n: v**0.5 for n, v in sums.items()})
        facts: dict[str, Any] = {}
        if self.options.statistic == "nuclear":
            left = self._left or {n: v / self.probe.batches for n, v in self._error().items()}
            facts["error"] = over(per_layer(layers, targets, left), values)
        return Measured(tuple(values), sums, facts)

    def _disagreement(self) -> Measured:
        if self.probe.batches < 2:
            raise ScoreError("statistic: agreement compares batches, and there was one: write num_batches: 2 or more")
        found: dict[str, list[float]] = {}
        for (name, _), kept in self.probe.kept().items():
            value = self.probe.how.value(kept, self.probe.batches)
            found.setdefault(name, []).extend([value] if value == value else [])  # of experts that were reached
        parts = {n: 1 - sum(v) / len(v) for n, v in found.items() if v}
        if not parts:
            raise NothingSeenError("all gradients are exactly zero, so that there is nothing to agree on")
        targets = [t for t in self.request.targets if t.name in parts]
        weighed = {t.name: parts[t.name] * t.params for t in targets}
        return Measured(tuple(per_weight(self.request.layers, targets, weighed)), parts)

    def _error(self, unscaled: bool | None = None) -> dict[str, float]:
        """Per target, the sum over batches of how much the nuclear norm may be more; empty of other statistics."""
        found: dict[str, float] = {}
        for (name, _), kept in (
            self.probe.kept(unscaled=unscaled).items() if self.options.statistic == "nuclear" else ()
        ):
            found[name] = found.get(name, 0.0) + float(kept[1])
        return found


def refuse_unreached(request: Request, reached: set[str]) -> None:
    """Raises: ScoreError for targets that no backward pass has come to."""
    unreached = [t.name for t in request.targets if t.name not in reached and not is_routed(t.name)]
    if unreached:
        kind = ScoreError if reached else NothingSeenError
        raise kind(
            f"{len(unreached)} target(s) got no gradient: {some(unreached)}. "
            "The model uses their weights without calling them, or the loss does not depend on them; "
            f"leave them out of target_modules: {leave_out(unreached, reached)}"
        )


def start(request: Request, options: Options) -> GradientNorm | Credit:
    """Begins the measurement."""
    if options.statistic == "credit":
        if request.overlaps:
            raise ScoreError("pick: complement needs gradients of every token, and statistic: credit looks at none")
        return Credit(request, options, lambda reached: refuse_unreached(request, reached))
    return GradientNorm(request, options)
