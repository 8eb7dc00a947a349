"""How far the model's output moves when a layer is left out, so that what enters it goes on in its place; per token that
counts.

FinerCut (arXiv 2405.18218) removes what moves the output least; what hurts most when it is gone does most, so a high score is
trained first, and `first: low` turns the sign. `distance: js` (its default, in nats), `kl` (of the model as it is to the
changed one, in nats) compare distributions, `angular` (angle over π) and `norm` (Euclidean) the logits themselves, or the last
hidden states of a model without a head.

`greedy: true` is its search: the layer that moves the output least is left out for good, and the others are judged without it,
to the end. A layer's score is then how far the output has moved by the time it is gone, together with all that went before.

A sub-layer (`unit: sublayer`) is left out by silencing the matrices that write its result to the stream.

Costs, for n layers, 1 + n forward passes over every batch besides the one that is watched; the search n(n + 3)/2, over all
batches once they are through, whose inputs are kept. Tokens that count are those with a label, or without labels those that are
no padding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.errors import ConfigError, ScoreError
from layerpeft.integrations.engines.gathers import without_engine
from layerpeft.model.evaluating import evaluating
from layerpeft.model.layers import find_module
from layerpeft.model.outputs import Distance, compared, kl, logits_of, per_token
from layerpeft.model.shorten import writing
from layerpeft.model.units import LAYER
from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.scoring import Measured, Request, WatchingCalls
from layerpeft.selection.states import First, cosines, entering_states, given, signed, states_in, with_states

TRAITS = Traits(of_whole=True, units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`distance`: between outputs; `greedy`: layers are left out one after another, not each alone."""

    distance: Literal["js", "kl", "angular", "norm"] = "js"
    greedy: bool = False


def needs(options: Options) -> str:
    """Forward passes over batches; those without layers it runs by itself."""
    return "forward"


def js(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Σ over rows of the Jensen-Shannon divergence between the softmax of (rows, classes) logits."""
    p, q = torch.log_softmax(before, -1), torch.log_softmax(after, -1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum() + (q.exp() * (q - middle)).sum()) / 2


DISTANCES: Mapping[str, Distance] = {
    "js": js,
    "kl": kl,
    "angular": lambda before, after: (cosines(before, after).arccos() / math.pi).sum(),
    "norm": lambda before, after: (before - after).norm(dim=-1).sum(),
}


class Removal(WatchingCalls):
    """The running measurement: remembers a batch's inputs, and runs it again without each layer once it is complete."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        if options.greedy and without_engine(self._model):
            raise ScoreError(
                "removal: greedy: true cannot run a model whose weights are divided as it is read; leave greedy out"
            )
        self._layers = sorted({t.layer for t in request.targets})
        self._sums = torch.zeros(len(self._layers) + 1, dtype=torch.float64)  # with the tokens
        self._calls: list[Any] = []
        self._searched: dict[int, float] | None = None

    def next_batch(self, scale: float | None = None) -> None:
        """Runs the batch that came through without each layer; its loss does not matter, so its scale does not."""
        if self._seen is None:
            return
        call, self._seen = self._seen, None
        if self.options.greedy:
            self._calls.append(call)
            self.batches += 1
            return
        hooked = bool(self._handles)
        self.detach()  # its own passes are none of training's
        found = self._without(call, [(layer,) for layer in self._layers])
        if not self.request.live or bool(found.isfinite().all()):  # else a loss scaler skips that step
            self._sums += found
            self.batches += 1
        if hooked:
            self.attach()

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums over processes; the search goes the same way in all."""
        if self.options.greedy:
            self._searched = self._search(add)
        self._sums = add(self._sums)

    def result(self) -> Measured:
        """By layer; 0 for layers without targets. Raises: ScoreError where no token counts, and where nothing moves."""
        if self.options.greedy:
            found = self._searched if self._searched is not None else self._search(lambda t: t)
        else:
            *sums, tokens = self._sums.tolist()
            found = dict(zip(self._layers, per_token(sums, tokens, "removal"), strict=True))
        if not any(found.values()):
            raise ScoreError("removal: leaving any one layer out changes nothing in the output; try distance: norm")
        return signed(self.options, (found.get(i, 0.0) for i in range(len(self.request.layers))))

    def _search(self, add: Callable[[torch.Tensor], torch.Tensor]) -> dict[int, float]:
        found: dict[int, float] = {}
        moved = 0.0
        while left := [layer for layer in self._layers if layer not in found]:
            sums = torch.zeros(len(left) + 1, dtype=torch.float64)
            for call in self._calls:
                sums += self._without(call, [(*found, layer) for layer in left])
            *values, tokens = add(sums).tolist()
            means = per_token(values, tokens, "removal")
            moved = max(moved, min(means))
            found[left[means.index(min(means))]] = moved
        return found

    def _without(self, call: Any, sets: list[tuple[int, ...]]) -> torch.Tensor:
        """Distances summed over tokens, one for each set of layers left out, and the tokens."""
        args, kwargs, dtype = call
        read = partial(logits_of, what="removal") if self.options.distance in ("js", "kl") else _numbers
        below = self.request.layers.unit != LAYER
        parts = [
            [m for layer in layers for m in (self._last(layer) if below else [self._block(layer)])] for layers in sets
        ]
        changes = [partial(silent if below else left_out, modules) for modules in parts]
        with evaluating(self._model, dtype):
            found, tokens = compared(
                lambda: self._model(*args, **kwargs),
                self.request.model,
                given(self._model, args, kwargs),
                changes,
                DISTANCES[self.options.distance],
                read,
            )
        return torch.tensor([*found, tokens], dtype=torch.float64)

    def _last(self, unit: int) -> list[nn.Module]:
        """What writes a sub-layer's result to the stream. Raises: ScoreError where that is not known."""
        try:
            targets = writing(self.request.layers.layers[unit])
        except ConfigError as error:
            raise ScoreError(f"removal: {error}") from error
        return [find_module(self.request.model, t.name) for t in targets]

    def _block(self, layer: int) -> nn.Module:
        return find_module(self.request.model, self.request.layers.layers[layer].name)


start = Removal


@contextmanager
def left_out(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, what enters these blocks leaves them as it is; all else that they give out stays.

    Raises (while they run): ScoreError where what leaves has another form than what enters.
    """
    entered: dict[nn.Module, torch.Tensor] = {}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = entering_states(args, kwargs)
        if states is not None:
            entered[block] = states.clone()  # blocks may change it in place

    def leave(block: nn.Module, _args: Any, output: Any) -> Any:
        before, after = entered.pop(block, None), states_in(output)
        if before is None or after is None or before.shape != after.shape:
            raise ScoreError(
                f"removal: a {type(block).__name__} cannot be left out, since it does not give out states of the form that it "
                "takes; leave such layers out with exclude, or choose by gradient_norm"
            )
        return with_states(output, before.to(after.dtype))

    handles = []
    try:
        for block in blocks:
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silent(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these modules give out zeros."""

    def zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = states_in(output)
        return output if states is None else with_states(output, torch.zeros_like(states))

    handles = [module.register_forward_hook(zeros) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _numbers(output: Any) -> torch.Tensor:
    """The logits, or without a head the last hidden states."""
    found = getattr(output, "logits", None)
    found = getattr(output, "last_hidden_state", None) if found is None else found
    return found if isinstance(found, torch.Tensor) else logits_of(output, "removal")
