"""What each layer does for the loss in a short run of adapters on all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.selection.scoring import Measured, Request, WatchingCalls, per_layer


class Trial(WatchingCalls):
    """A running measurement that remembers the batches, and trains on them when it is asked for its result.

    `name`: what measures so, in messages.
    """

    name = "statistic: credit"

    def __init__(self, request: Request, options: Any) -> None:
        super().__init__(request, options)
        if request.live or request.run_steps is None:
            raise ScoreError(
                f"{self.name} trains for some steps on batches of its own, before the layers are wrapped: pass batches=… to "
                "the config, to get_peft_model or to score_layers"
            )
        self._calls: list[Mapping[str, Any]] = []
        self._found: dict[str, float] | None = None

    def next_batch(self, scale: float | None = None) -> None:
        """Keeps what the model was called with."""
        if self._running and self._seen is not None:
            self._calls.append(self._seen[1])
        super().next_batch(scale)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The mean over processes, each of which trains on its own batches."""
        mine, names = self._run(), [t.name for t in self.request.targets]
        *sums, count = add(torch.tensor([*(mine.get(n, 0.0) for n in names), 1.0], dtype=torch.float64)).tolist()
        self._found = {n: s / count for n, s in zip(names, sums, strict=True) if n in mine}

    def found(self) -> dict[str, float]:
        """A number per target, of this process or the mean of all. Raises: ScoreError."""
        return self._found if self._found is not None else self._run()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        super()._see(module, args, kwargs, output)
        self._running = True

    def _run(self) -> dict[str, float]:
        if not self._calls:
            raise ScoreError(f"{self.name} saw no batch")
        return self.run()

    def run(self) -> dict[str, float]:
        """Trains, and says what came of it."""
        raise NotImplementedError


class Credit(Trial):
    """What adapters of a layer did for the loss.

    `credit_l = Σ over steps, over the layer's adapters, of -g · Δθ`, g the gradient of the step's batch: the first-order share of
    the loss's decrease (Loss Change Allocation, Lan et al., arXiv 1909.01440, which takes the path's integral by Runge-Kutta).
    Below 0: the layer worked against it.
    """

    def __init__(self, request: Request, options: Any, refuse: Callable[[set[str]], None]) -> None:
        super().__init__(request, options)
        self._refuse = refuse

    def result(self) -> Measured:
        """Credits per layer and per target. Raises: ScoreError."""
        found = self.found()
        return Measured(tuple(per_layer(self.request.layers, self.request.targets, found)), found)

    def run(self) -> dict[str, float]:
        """Of every target that was reached."""
        found: dict[str, float] = {}

        def see(step: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
            for name, gradient, change in step:
                found[name] = found.get(name, 0.0) - float((gradient.double() * change.double()).sum())

        asked, run = self.options, self.request.run_steps
        assert run is not None
        run(
            self.request.model, self.request.targets, self._calls, see, steps=asked.steps, rank=asked.k, lr=asked.lr,
            seed=self.request.seed,
        )  # fmt: skip
        self._refuse(set(found))
        return found
