"""How much of the model's answer a layer brings about, read through the model's own final norm and head (the logit lens).

The states after every layer are sent through all that comes after the last one, whatever that is (final norm, head, soft caps,
a pooler), as in nostalgebraist's "interpreting GPT: the logit lens" (2020), which Belrose et al. (arXiv 2303.08112) examine.
`a_l` is how far that agrees with the final answer at the tokens that count (with a label; without labels, real ones):

- `measure: top1`: share of tokens whose first choice is the final one;
- `measure: kl`: −KL(final answer ‖ answer after layer l), in nats per token.

The score is `a_l − a_{l−1}`, the gain of layer l (`form: gain`; the gains add up to `a_last` minus that of what enters the
first layer), or `a_l` itself (`form: agreement`, which mostly grows with depth). A layer that settles the answer of many tokens
is where training moves the answer most directly, so a high score is trained first; no paper chooses by it, and `first: low`
turns the sign.

Of a part of a layer (`unit: sublayer`) the states are those of the stream after it, and the gain is over what it reads; where
parts follow each other their gains add up to the layer's.

Costs the forward passes, and for every batch n + 1 passes, n the layers or parts, that run everything but the layers: embeddings,
norm, head (of an encoder-decoder also its other stack); parts that stand beside each other take one more each. The states of one
batch after all of them are held at a time.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.integrations.torch import eager
from layerpeft.model.evaluating import evaluating, standing_in
from layerpeft.model.layers import find_module
from layerpeft.model.outputs import counted_tokens, kl, logits_of, per_token, summed
from layerpeft.model.units import LAYER
from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.scoring import Measured, Request, WatchingCalls
from layerpeft.selection.states import First, entering_states, given, signed, states_in, streams, with_states

TRAITS = Traits(units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`measure`: how answers are compared; `form`: what a layer adds, or how far things are after it."""

    measure: Literal["top1", "kl"] = "top1"
    form: Literal["gain", "agreement"] = "gain"


def needs(options: Options) -> str:
    """Forward passes over batches; those without layers it runs by itself."""
    return "forward"


class Lens(WatchingCalls):
    """The running measurement: of each unit the agreement of what enters and of what leaves it, over tokens; and those."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        self._blocks = [find_module(request.model, name) for name in request.layers.whole.names]
        self._sums = torch.zeros(2 * len(request.layers) + 1, dtype=torch.float64)
        self._entered: torch.Tensor | None = None
        self._left: dict[int, Any] = {}  # what each block gave out in the running batch
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the states before and after each of its parts

    def attach(self) -> None:
        """Puts the hooks on."""
        super().attach()
        self._handles.append(self._blocks[0].register_forward_pre_hook(eager(self._enter), with_kwargs=True))
        for number, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_hook(self._leave(number)))
        if self.request.layers.unit != LAYER:
            self._handles += streams(self.request, range(len(self.request.layers)), self._pass)

    def next_batch(self, scale: float | None = None) -> None:
        """Reads the batch that came through."""
        if self._seen is not None:
            sides = self._sides()
            if not self.request.live or all(bool(s.isfinite().all()) for pair in sides for s in pair):
                hooked = bool(self._handles)
                self.detach()
                self._sums += self._read(sides)
                self._running = True
                if hooked:
                    self.attach()
        self._seen, self._entered, self._left, self._parts = None, None, {}, {}
        super().next_batch(scale)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums over processes."""
        self._sums = add(self._sums)

    def result(self) -> Measured:
        """By layer. Raises: NothingSeenError when no token counted."""
        *sums, tokens = self._sums.tolist()
        means, gain = per_token(sums, tokens, "lens"), self.options.form == "gain"
        return signed(self.options, (b - a if gain else b for a, b in zip(means[::2], means[1::2], strict=True)))

    def _sides(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What entered and left each unit, in their order; at last what left the last block, twice. Raises: ScoreError."""
        left = [states_in(self._left[i]) if i in self._left else None for i in range(len(self._blocks))]
        layers, named = (
            self.request.layers,
            zip(("what enters", *self.request.layers.whole.names), [self._entered, *left]),
        )
        missing = [name for name, states in named if states is None]
        missing += [n for i, n in enumerate(layers.names) if layers.unit != LAYER and i not in self._parts]
        if missing:
            raise ScoreError(f"lens: no hidden states of {missing[0]} were seen; choose by gradient_norm")
        chain: list[Any] = [self._entered, *left]
        parts = [self._parts[i] for i in range(len(layers))] if layers.unit != LAYER else list(zip(chain, chain[1:]))
        return [*parts, (chain[-1], chain[-1])]

    def _read(self, sides: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Agreements summed over tokens, of both sides of each unit, and the tokens; equal states are read once."""
        assert self._seen is not None
        args, kwargs, dtype = self._seen
        inputs, known = given(self._model, args, kwargs), list[tuple[torch.Tensor, float]]()
        counted = final = torch.empty(0)
        with evaluating(self._model, dtype):
            for state in (s for pair in reversed(sides) for s in reversed(pair)):
                if any(torch.equal(s, state) for s, _ in known):
                    continue
                with ExitStack() as stack:
                    for number, block in enumerate(self._blocks):
                        output = with_states(self._left[number], state)
                        stack.enter_context(standing_in(block, lambda *_, output=output, **__: output))
                    logits = logits_of(self._model(*args, **kwargs), "lens")
                if not known:
                    counted = counted_tokens(self.request.model, inputs, logits)
                    final = logits[counted]
                now = logits[counted]
                alike = self.options.measure == "top1"
                agreed = (now.argmax(-1) == final.argmax(-1)).sum() if alike else -summed(kl, final, now)
                known.append((state, float(agreed)))
        found = [next(a for s, a in known if torch.equal(s, state)) for pair in sides[:-1] for state in pair]
        return torch.tensor([*found, len(final)], dtype=torch.float64)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = entering_states(args, kwargs)
        self._entered = None if states is None else states.detach().clone()

    def _leave(self, number: int) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            states = states_in(output)
            if states is not None:
                self._left[number] = with_states(output, states.detach().clone())

        return eager(leave)

    def _pass(self, unit: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self._parts[unit] = before.detach().clone(), after.detach().clone()


start = Lens
