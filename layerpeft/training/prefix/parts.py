"""Parts of a model, of which nothing else is ever read: what lies in front of its blocks, and one block alone.

Each is what `before` of `filling.settings` does to a model without numbers. What is emptied has no weights any more, and whoever
asks for them says so: nothing is made up in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from layerpeft.integrations.filling import LOADED_MARK
from layerpeft.training.prefix.below import in_front
from layerpeft.training.prefix.running import Form
from layerpeft.training.prefix.upper import StandIn

Before = Callable[[nn.Module], None]


def front_alone(names: Sequence[str], forms: Sequence[Form]) -> Before:
    """What comes before the blocks of these names, which all are stand-ins (`forms`: of the lower ones), with whatever is tied to
    it; of the rest the buffers alone."""
    return partial(_front_alone, names, forms)


def block_alone(name: str) -> Before:
    """The block of that name."""
    return partial(_block_alone, name)


def _front_alone(names: Sequence[str], forms: Sequence[Form], model: nn.Module) -> None:
    front = {id(module) for _, module in in_front(model, names[0])}
    for number, name in enumerate(names):
        model.set_submodule(name, StandIn(model.get_submodule(name), forms[number] if number < len(forms) else None))
    pairs: Any = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*pairs, *pairs.values()}
    for name, module in model.named_modules():
        held = [f"{name}.{key}" for key in module._parameters]
        if id(module) not in front and held and not module._buffers and tied.isdisjoint(held):
            module._parameters.clear()
            setattr(module, LOADED_MARK, True)
    _read_what_is_there(model)


def _block_alone(name: str, model: nn.Module) -> None:
    block = model.get_submodule(name)
    inside = {id(module) for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._parameters.clear()
            setattr(module, LOADED_MARK, True)
            for key in [k for k in module._buffers if k not in module._non_persistent_buffers_set]:
                del module._buffers[key]
    model.all_tied_weights_keys = {}  # type: ignore[assignment]
    _read_what_is_there(model)


def _read_what_is_there(model: Any) -> None:
    """The rest of the checkpoint is nothing to be told of."""
    model._keys_to_ignore_on_load_unexpected = {"."}
