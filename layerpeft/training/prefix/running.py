"""One forward pass through a stack whose lower blocks may be passed over: what they do in it, and what comes to the cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerpeft.selection.states import entering_states

Decide = Callable[[torch.Tensor | None, Mapping[str, Any]], torch.Tensor | None]
Form = tuple[None, ...] | None  # what a block gives out besides hidden states, which come first; None: these alone
TWICE = "blocks run several times in one pass"
MORE = "blocks hand more than hidden states upwards"


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
        self._own = [vars(block).get("forward") for block in blocks]
        for number, block in enumerate(blocks):
            block.forward = _Through(self, number, block.forward)  # type: ignore[method-assign]

    def close(self) -> None:
        """Gives the blocks back what they did."""
        for block, own in zip(self.blocks, self._own, strict=True):
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own  # type: ignore[method-assign]
        self.blocks, self._own = [], []

    def run(self, number: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block does now."""
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
            return _shaped(self.forms[number], self.kept if number == last - 1 else hidden)
        output = forward(*args, **kwargs)
        self._learn(number, output)
        return output

    def _learn(self, number: int, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.forms[number] = None
        elif type(output) is tuple and isinstance(output[0], torch.Tensor) and all(part is None for part in output[1:]):
            self.forms[number] = (None,) * len(output[1:])
        else:
            self.why = MORE

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


class _Through:
    """Lies in the place of a block's `forward` during one pass."""

    def __init__(self, running: Running, number: int, forward: Callable[..., Any]) -> None:
        self.running, self.number, self.forward = running, number, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.running.run(self.number, self.forward, args, kwargs)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The random states that a forward pass there may draw from."""
    found = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        found.append(torch.get_device_module(device).get_rng_state(device))
    return found


def _shaped(form: Form, hidden: torch.Tensor) -> Any:
    return hidden if form is None else (hidden, *form)
