"""Learned importance by suppression (IST, arXiv 2410.11772): what can be damped without harm is unimportant.

I_l starts at 0, high is unimportant. A measurement draws `rollouts` distinct subsets of n/2 of the layers (successive
draws with weights p_l = sigmoid(I_l)), runs one forward pass per subset with the LoRA output of its layers scaled by
`suppression`, and adds `reward · p_l (1 - p_l) · lr` to I_l for every subset that holds l, with reward = exp(-loss) -
mean over the subsets. The score is -I, so that higher means "train this first"; the paper's rule is `pick: sigmoid`.

The passes run without gradients, in evaluation mode, on the last micro-batch that training itself saw, so no second
data loader is needed; the model, its modes, hooks and random state are left as they were. `num_items_in_batch` is not
passed on: the loss is this batch's own mean. Faults that are not shared: the search for distinct subsets, which never
ends for few layers; one remembered scaling for all modules; subsets from the global generator. What stays is how weak
the signal is: losses .01 apart move I by .009, and while the adapters still give nothing out (B = 0), by exactly
nothing, so the choice is close to uniform for a long time.

Costs `rollouts` forward passes over one micro-batch.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from torch import nn

from layerpeft.errors import ScoreError, mentions
from layerpeft.integrations.losses import loss_of
from layerpeft.model.evaluating import evaluating
from layerpeft.model.layers import standing_at
from layerpeft.model.names import modules_in
from layerpeft.selection.draws import sigmoid, successive
from layerpeft.selection.scorers import Traits
from layerpeft.selection.scoring import Measured, Request, WatchingCalls

WHY = "its rollouts damp half of all that is scored, which says nothing of single linears"
TRAITS = Traits(live_only=True, again_only=True, units=("layer", "sublayer"), reason=WHY)
TRIES = 1000  # draws that may repeat a subset before the missing ones are taken in order


@dataclass(frozen=True)
class Options:
    """`rollouts`: subsets per measurement; `suppression`: the factor on a damped layer; `lr`: of the importance."""

    rollouts: int = 3
    suppression: float = 0.25
    lr: float = 10.0


def needs(options: Options) -> str:
    """The forward passes of training; those with damped layers it runs by itself."""
    return "forward"


def subsets(importance: Mapping[int, float], rollouts: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct subsets of half of the layers (at least one), drawn with weights sigmoid(I); fewer where there are not so many."""
    layers = sorted(importance)
    half = max(1, len(layers) // 2)
    wanted = min(rollouts, math.comb(len(layers), half))
    weights = [sigmoid(importance[i]) for i in layers]
    generator = random.Random(f"layerpeft importance {seed}")
    found: dict[tuple[int, ...], None] = {}
    for _ in range(TRIES):
        if len(found) == wanted:
            return list(found)
        found[tuple(sorted(layers[i] for i in successive(weights, half, generator)))] = None
    for missing in combinations(layers, half):
        if len(found) < wanted:
            found[missing] = None
    return list(found)


def moved(
    importance: Mapping[int, float], damped: Sequence[Sequence[int]], losses: Sequence[float], lr: float
) -> dict[int, float]:
    """I after the rollouts: layers `damped[r]` gave `losses[r]`. All steps start from the same I."""
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    after = dict(importance)
    for layers, reward in zip(damped, rewards, strict=True):
        for layer in layers:
            p = sigmoid(importance[layer])
            after[layer] += (reward - mean) * p * (1 - p) * lr
    return after


class Suppression(WatchingCalls):
    """The running measurement: remembers the last micro-batch, and damps layers on it when it is asked for its result."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        held = sorted({t.layer for t in request.targets})
        before = request.before or (None,) * len(request.layers)
        self.importance = {i: -(before[i] or 0.0) for i in held}
        self.damped = subsets(self.importance, options.rollouts, request.seed)
        self._losses: list[float] | None = None  # run anew, so that scales do not matter

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The mean of every process's losses; every process damps the same layers, each on its own micro-batch."""
        mine = [*self._run(), 1.0] if self._seen is not None else [0.0] * (len(self.damped) + 1)
        *sums, count = add(torch.tensor(mine, dtype=torch.float64)).tolist()
        self._losses = [s / count for s in sums] if count else None

    def result(self) -> Measured:
        """-I by layer; 0 for layers that hold no target. Raises: ScoreError when no batch was seen, or it has no finite loss."""
        losses = self._losses if self._losses is not None else self._run()
        bad = [loss for loss in losses if not math.isfinite(loss)]
        if bad:
            raise ScoreError(
                f"importance: the loss of a damped forward pass is {bad[0]}; there is nothing to learn from it"
            )
        after = moved(self.importance, self.damped, losses, self.options.lr)
        return Measured(tuple(0.0 - after.get(i, 0.0) for i in range(len(self.request.layers))))

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            super()._see(module, args, kwargs, output)
            self._running = True

    def _run(self) -> list[float]:
        """The loss with each subset damped."""
        if self._seen is None:
            raise ScoreError("importance is measured on the micro-batches of training, and none has been seen")
        args, kwargs, dtype = self._seen
        found = []
        with evaluating(self._model, dtype):
            for layers in self.damped:
                with ExitStack() as stack:
                    for layer in layers:
                        for name in modules_in(self.request.layers.names[layer]):
                            module = standing_at(self.request.model, name)
                            stack.enter_context(_damp(module, layer, self.options.suppression))
                    loss = loss_of(self._model(*args, **kwargs))
                if loss is None:
                    raise ScoreError("importance: the model returned no loss; it needs the labels in its inputs")
                found.append(float(loss.mean()))
        return found


start = Suppression


@contextmanager
def _damp(block: nn.Module, layer: int, factor: float) -> Iterator[None]:
    try:
        with rescale_adapter_scale(block, factor):
            yield
    except ValueError as error:
        if not mentions(error, "LoraLayer"):
            raise
        raise ScoreError(
            f"importance damps LoRA adapters, and layer {layer} has none; it goes with method: lora"
        ) from error
