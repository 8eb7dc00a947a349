"""A model that DeepSpeed's stage 3 divides as it is read, used before there is an engine: whole layer by layer.

Each layer, and each module with weights outside of layers, is whole while its own forward or backward pass runs. Every process must
send as many batches through.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.engines.deepspeed import gathered, is_part
from layerpeft.integrations.torch import tensors_of


def without_engine(model: nn.Module) -> bool:
    """Whether weights are divided, and nobody puts them together for a forward pass."""
    parts = [p for p in model.parameters() if is_part(p)]
    return bool(parts) and not any(hasattr(p, "_z3_optimizer") for p in parts)


@contextmanager
def layer_by_layer(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, forward and backward passes of such a model find the weights they need."""
    with ExitStack() as stack:
        units = list(layers)
        inside = {id(m) for layer in units for m in layer.modules()}
        units += [m for m in model.modules() if id(m) not in inside and m._parameters]
        for unit in units:
            stack.callback(_Unit(unit).close)
        yield


class _Unit:
    """What is whole at a time. State is real here: hooks, and whether it is."""

    def __init__(self, module: nn.Module) -> None:
        own = module.parameters() if module._modules else module.parameters(recurse=False)
        self.parameters = [p for p in own if is_part(p)]
        self._open: ExitStack | None = None
        self._waiting = 0  # inputs whose gradients are still to come
        self._handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def close(self) -> None:
        """For good."""
        self.part()
        for handle in self._handles:
            handle.remove()

    def join(self, *_: Any) -> None:
        """The weights are whole from now on."""
        if self._open is None:
            self._open = ExitStack()
            self._open.enter_context(gathered(self.parameters))

    def part(self) -> None:
        """They are divided again."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.join()
        given = [t for t in tensors_of([*args, *kwargs.values()]) if t.requires_grad]
        self._waiting = len(given)
        for tensor in given:
            tensor.register_hook(self._done)

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.part()
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(self.join)

    def _done(self, _gradient: torch.Tensor) -> None:
        self._waiting -= 1
        if not self._waiting:  # nothing of its backward pass is left
            self.part()
