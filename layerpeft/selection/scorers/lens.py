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

Costs the forward passes, and for every layer and batch one pass that runs everything but the layers: embeddings, norm, head (of
an encoder-decoder also its other stack). The states of one batch after all layers are held at a time.
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
from layerpeft.selection.scoring import Measured, Request, WatchingCalls
from layerpeft.selection.states import First, entering_states, given, signed, states_in, with_states


@dataclass(frozen=True)
class Options(First):
    """`measure`: how answers are compared; `form`: what a layer adds, or how far things are after it."""

    measure: Literal["top1", "kl"] = "top1"
    form: Literal["gain", "agreement"] = "gain"


def needs(options: Options) -> str:
    """Forward passes over batches; those without layers it runs by itself."""
    return "forward"


class Lens(WatchingCalls):
    """The running measurement: the agreement of what enters the first layer and what leaves each, over tokens; and those."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        self._blocks = [find_module(request.model, name) for name in request.layers.names]
        self._sums = torch.zeros(len(self._blocks) + 2, dtype=torch.float64)
        self._entered: torch.Tensor | None = None
        self._left: dict[int, Any] = {}  # what each block gave out in the running batch

    def attach(self) -> None:
        """Puts the hooks on."""
        super().attach()
        self._handles.append(self._blocks[0].register_forward_pre_hook(eager(self._enter), with_kwargs=True))
        for number, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_hook(self._leave(number)))

    def next_batch(self, scale: float | None = None) -> None:
        """Reads the batch that came through."""
        if self._seen is not None:
            entered, left = self._entered, [self._left.get(i) for i in range(len(self._blocks))]
            states = [entered, *(None if output is None else states_in(output) for output in left)]
            if missing := [n for n, s in zip(("what enters", *self.request.layers.names), states) if s is None]:
                raise ScoreError(f"lens: no hidden states of {missing[0]} were seen; choose by gradient_norm")
            if not self.request.live or all(bool(s.isfinite().all()) for s in states if s is not None):
                hooked = bool(self._handles)
                self.detach()
                self._sums += self._read(states, left)
                self._running = True
                if hooked:
                    self.attach()
        self._seen, self._entered, self._left = None, None, {}
        super().next_batch(scale)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums over processes."""
        self._sums = add(self._sums)

    def result(self) -> Measured:
        """By layer. Raises: NothingSeenError when no token counted."""
        *sums, tokens = self._sums.tolist()
        means = per_token(sums, tokens, "lens")
        below = means if self.options.form == "gain" else [0.0] * len(means)
        return signed(self.options, (a - b for a, b in zip(means[1:], below, strict=False)))

    def _read(self, states: list[Any], left: list[Any]) -> torch.Tensor:
        assert self._seen is not None
        args, kwargs, dtype = self._seen
        inputs, found = given(self._model, args, kwargs), []
        counted = final = torch.empty(0)
        with evaluating(self._model, dtype):
            for state in reversed(states):
                with ExitStack() as stack:
                    for block, output in zip(self._blocks, left, strict=True):
                        stack.enter_context(standing_in(block, with_states(output, state)))
                    logits = logits_of(self._model(*args, **kwargs), "lens")
                if not found:
                    counted = counted_tokens(self.request.model, inputs, logits)
                    final = logits[counted]
                now = logits[counted]
                alike = self.options.measure == "top1"
                found.append(float((now.argmax(-1) == final.argmax(-1)).sum()) if alike else -summed(kl, final, now))
        return torch.tensor([*reversed(found), len(final)], dtype=torch.float64)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = entering_states(args, kwargs)
        self._entered = None if states is None else states.detach().clone()

    def _leave(self, number: int) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            states = states_in(output)
            if states is not None:
                self._left[number] = with_states(output, states.detach().clone())

        return eager(leave)


start = Lens
