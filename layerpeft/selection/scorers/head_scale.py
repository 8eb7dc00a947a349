"""How far a scale that is trained for an attention head goes: LoFiT's first stage (Yin et al., arXiv 2406.01563, NeurIPS 2024).

Every head gets a vector A (size), which multiplies what it gives out by `1 + A`; all of them are trained for some steps by AdamW,
with `l1` times the sum of their absolute values added to the loss, and a head's score is `‖A‖`. Higher means "train this first".
Weights, gradients, modes and random states are as they were afterwards.

As in the published code A begins normal with a spread of 1e-3, the learning rate falls to 0 in a line and there is no weight decay.
Not as there: `steps` over the batches that were seen, again and again, in the place of 5 epochs of batches of 8, and gradients are
not clipped. In several processes the mean of the scores, each from its own batches. Cost: one forward pass over each batch, and
`steps` forward and backward passes down to the first head.
"""

from dataclasses import dataclass

from layerpeft.model.heads import HEAD
from layerpeft.selection.credit import Trial
from layerpeft.selection.scorers import Traits
from layerpeft.selection.scoring import Measured, per_layer
from layerpeft.selection.typecheck import checked

TRAITS = Traits(units=(HEAD,))


@dataclass(frozen=True)
class Options:
    """`steps`, `lr`, `l1` of the short run; the published values for Llama-2-7B are lr 5e-3 and l1 5e-4."""

    steps: int = 100
    lr: float = 5e-3
    l1: float = checked(5e-4, least=0)

    @property
    def only_before(self) -> str:
        """It trains for itself."""
        return "by: head_scale trains for some steps on batches of its own, before training"


def needs(options: Options) -> str:
    """A forward pass over each batch; it trains on them by itself."""
    return "forward"


class HeadScale(Trial):
    """The running measurement."""

    name = "by: head_scale"

    def run(self) -> dict[str, float]:
        """The squared norm of every head's scale."""
        asked, run = self.options, self.request.run_steps
        assert run is not None
        trained = run(
            self.request.model, self.request.targets, self._calls, lambda step: None, steps=asked.steps, lr=asked.lr,
            seed=self.request.seed, l1=asked.l1,
        )  # fmt: skip
        return {name: float(scale.double().square().sum()) for name, (scale,) in trained.items()}

    def result(self) -> Measured:
        """Norms per unit and per head. Raises: ScoreError."""
        found = self.found()
        values = per_layer(self.request.layers, self.request.targets, found)
        return Measured(tuple(v**0.5 for v in values), {name: v**0.5 for name, v in found.items()})


start = HeadScale
