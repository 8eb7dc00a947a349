"""One forward pass through a stack whose lower blocks may be passed over: what they do in it, and what comes to the cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from layerpeft.model.evaluating import standing_in
from layerpeft.selection.states import entering_states

Decide = Callable[[torch.Tensor | None, Mapping[str, Any]], torch.Tensor | None]
Form = tuple[None, ...] | None  # what a block gives out besides hidden states, which come first; None: these alone
TWICE = "blocks run several times in one pass"
MORE = "blocks hand more than hidden states upwards"
RANDOM = "what runs below layer {} draws random numbers"


class Running:
    """State is real here, until `close`: `kept` is what enters the block at the cut in the place of what was computed (None: all is
    computed), `entered` what came there, `why` what makes this pass unfit."""

    def __init__(
        self, blocks: list[nn.Module], forms: dict[int, Form], decide: Decide, device: torch.device | None = None
    ) -> None:
        self.blocks, self.forms, self.decide, self.device = blocks, forms, decide, device
        self.kept: torch.Tensor | None = None
        self.entered: torch.Tensor | None = None
        self.why: str | None = None
        self.random: list[torch.Tensor] = []  # random states where the cut was reached
        self.begun = False
        self._stack = ExitStack()
        for number, block in enumerate(blocks):
            self._stack.enter_context(standing_in(block, partial(self._run, number, block.forward)))

    def close(self) -> None:
        """Gives the blocks back what they did."""
        self._stack.close()

    def _run(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden, last = entering_states(args, kwargs), len(self.blocks) - 1
        if number == last:
            self._arrive(hidden)
            return forward(*args, **kwargs)
        if number == 0:
            if self.begun:
                self.why, self.kept = TWICE, None
            else:
                self.begun, self.kept = True, self.decide(hidden, kwargs)
        if self.kept is not None and hidden is not None:
            return shaped(self.forms[number], self.kept if number == last - 1 else hidden)
        output = forward(*args, **kwargs)
        if hands_on(output):
            self.forms[number] = form_of(output)
        else:
            self.why = MORE
        return output

    def _arrive(self, hidden: torch.Tensor | None) -> None:
        if self.kept is None:
            if self.entered is not None:
                self.why = TWICE
            self.entered = None if hidden is None else hidden.detach()
            self.random = random_states(self.device) if self.device is not None else []
        elif hidden is not None and hidden.data_ptr() != self.kept.data_ptr():
            # Something came in between. In place, and unseen by autograd: checkpointing holds this very tensor, and computes
            # from it again in the backward pass.
            hidden.data.copy_(self.kept)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The random states that a forward pass there may draw from."""
    found = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        found.append(torch.get_device_module(device).get_rng_state(device))
    return found


def drew(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    """Whether anything was drawn between these random states."""
    return len(before) != len(after) or not all(map(torch.equal, before, after))


def hands_on(output: Any) -> bool:
    """Whether a block gives out hidden states and nothing else."""
    parts = output if type(output) is tuple else (output,)
    return isinstance(parts[0], torch.Tensor) and all(part is None for part in parts[1:])


def form_of(output: Any) -> Form:
    """What such a block gives out besides."""
    return (None,) * (len(output) - 1) if type(output) is tuple else None


def shaped(form: Form, hidden: Any) -> Any:
    """Hidden states as a block of this form gives them out."""
    return hidden if form is None else (hidden, *form)
