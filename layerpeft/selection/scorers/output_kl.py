"""How far the model's output moves when one layer alone is rounded: KL(as it is ‖ with the layer rounded), in nats per token.

The tokens are those with a label, or without labels those that are not padding. Costs one forward pass over every batch
for each layer, in evaluation mode and without gradients, after one with the model as it is; the weights themselves are put
back each time. A measured loss, where the other scorers' are guesses, but it still takes one layer at a time: what two
rounded layers do together is not in it. In a 16-bit model every value also holds some 1e-4 nats that any change makes.
"""

from collections.abc import Callable

import torch

from layerpeft.errors import ScoreError
from layerpeft.model.evaluating import evaluating
from layerpeft.model.outputs import per_token
from layerpeft.model.rounding import check_roundable, divergences
from layerpeft.selection.scorers import OF_TARGETS, Traits
from layerpeft.selection.scorers.quantization_error import Rounding
from layerpeft.selection.scoring import Measured, Request, WatchingCalls

TRAITS = Traits(of_whole=True, units=OF_TARGETS)
Options = Rounding


def needs(options: Options) -> str:
    """Forward passes over batches; those with rounded layers it runs by itself."""
    return "forward"


class Divergence(WatchingCalls):
    """The running measurement: remembers a batch's inputs, and runs it again with each layer rounded once it is complete.

    Raises: ScoreError for experts in 3-D tensors; ConfigError for what else cannot be rounded.
    """

    def __init__(self, request: Request, options: Options) -> None:
        unfit = [t.name for t in request.targets if t.kind not in ("linear", "conv1d")]
        if unfit:
            raise ScoreError(
                f"output_kl rounds linears and Conv1D; not {', '.join(unfit[:6])}. Leave them out of target_modules and "
                "target_parameters, or choose by quantization_error."
            )
        super().__init__(request, options)
        self._storage = options.storage
        self._layers = sorted({t.layer for t in request.targets})
        self._assignments = [
            {t.name: str(options.precision) for t in request.targets if t.layer == layer} for layer in self._layers
        ]
        check_roundable(request.model, {k: v for a in self._assignments for k, v in a.items()}, self._storage)
        self._sums = [0.0] * len(self._layers)
        self._tokens = 0.0

    def next_batch(self, scale: float | None = None) -> None:
        """Runs the batch that came through with each layer rounded; its loss does not matter, so its scale does not."""
        if self._seen is None:
            return
        (args, kwargs, dtype), self._seen = self._seen, None
        hooked = bool(self._handles)
        self.detach()  # its own passes are none of training's
        with evaluating(self._model, dtype):
            found, tokens = divergences(
                lambda: self._model(*args, **kwargs), self.request.model, kwargs, self._assignments, self._storage
            )
        if hooked:
            self.attach()
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)]
        self._tokens += tokens
        self.batches += 1

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums divergences and tokens over processes."""
        *self._sums, self._tokens = add(torch.tensor([*self._sums, self._tokens], dtype=torch.float64)).tolist()

    def result(self) -> Measured:
        """Nats per token by layer; 0 for layers without targets. Raises: ScoreError when no token counted."""
        found = dict(zip(self._layers, per_token(self._sums, self._tokens), strict=True))
        if not any(found.values()):
            raise ScoreError("rounding any one layer changes nothing in the output; choose by another scorer")
        return Measured(tuple(found.get(i, 0.0) for i in range(len(self.request.layers))))


start = Divergence
