"""The residual stream inside of a block: what it is before and after each of its parts (attention, MLP, …), from one forward
pass.

A part reads the stream itself or its norm, so the stream before it is what goes in, or what goes into the norm that this comes
out of; the stream after it is the one before the next part, or what the block gives out. In blocks that end with a norm (BERT,
BART) what comes out of a norm is the stream. Parts that read the same stream (parallel blocks: GPT-NeoX, Falcon) add what they
give out to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.integrations.torch import eager
from layerpeft.model.layers import find_module
from layerpeft.model.names import modules_in

Tell = Callable[[str, torch.Tensor, torch.Tensor], None]  # name of a part, the stream before and after it
Read = Callable[[Any], torch.Tensor | None]  # the hidden states in an output
Enter = Callable[[Any, Any], torch.Tensor | None]  # and among arguments


@dataclass
class _Part:
    """One part while its block runs; `read`: what went in, `source`: what that is the norm of, or itself; `before`: its copy."""

    name: str
    read: torch.Tensor
    source: torch.Tensor
    before: torch.Tensor
    output: torch.Tensor | None = None


class Stream:
    """Follows the stream through one block. State is real here: hooks are on it until their handles are removed."""

    def __init__(self, model: nn.Module, name: str, parts: Sequence[str], tell: Tell) -> None:
        self.tell, self.name = tell, name
        self.block = find_module(model, name)
        self.modules = [(part, [find_module(model, n) for n in modules_in(part)]) for part in parts]
        self._normed: list[tuple[torch.Tensor, torch.Tensor]] = []  # what came out of a norm, and what went in
        self._parts: list[_Part] = []

    def attach(self, enter: Enter, read: Read) -> list[Any]:
        """Puts the hooks on; gives their handles."""

        def begin(*_: Any) -> None:
            self._normed, self._parts = [], []

        def normed(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if (
                (states := enter(args, kwargs)) is not None
                and isinstance(output, torch.Tensor)
                and output is not states
            ):
                self._normed.append((output, states))

        handles = [self.block.register_forward_pre_hook(eager(begin))]
        for module in self.block.modules():
            if "norm" in type(module).__name__.lower() and not module._modules:
                handles.append(module.register_forward_hook(eager(normed), with_kwargs=True))
        for part, modules in self.modules:
            for module in modules:
                handles.append(module.register_forward_pre_hook(self._begin(part, enter), with_kwargs=True))
                handles.append(module.register_forward_hook(self._end(part, read)))
        handles.append(self.block.register_forward_hook(eager(lambda _m, _args, output: self._leave(read(output)))))
        return handles

    def _begin(self, name: str, enter: Enter) -> Any:
        def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
            states = enter(args, kwargs)
            if states is not None and not (self._parts and self._parts[-1].name == name):
                source = next((before for after, before in self._normed if after is states), states)
                self._parts.append(_Part(name, states.detach().clone(), source, source.detach().clone()))

        return eager(begin)

    def _end(self, name: str, read: Read) -> Any:
        def end(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._parts and self._parts[-1].name == name:
                self._parts[-1].output = read(output)

        return eager(end)

    def _leave(self, output: torch.Tensor | None) -> None:
        parts, normed = self._parts, self._normed
        self._parts, self._normed = [], []
        if output is None or not parts:
            return
        last = any(after is output for after, _ in normed)  # of norms: the stream is what comes out of them
        befores = [part.read if last else part.before for part in parts]
        for number, (part, before) in enumerate(zip(parts, befores, strict=True)):
            beside = [n for n in (number - 1, number + 1) if 0 <= n < len(parts) and parts[n].source is part.source]
            if beside and not last and part.output is not None:
                after = before + part.output.detach().view_as(before)
            else:
                after = befores[number + 1] if number + 1 < len(parts) else output
            if before.numel() != output.numel() or after.numel() != output.numel():
                raise ScoreError(
                    f"the parts of {self.name} do not hand on one stream of states of the shape {tuple(output.shape)}; choose "
                    "whole layers (unit: layer), or by gradient_norm"
                )
            self.tell(part.name, before.view_as(output), after.view_as(output))
