"""What blocks below a cut hand upwards, found on a model without weights: in which form, and whether hidden states are all of it.

Autograd says whether anything else goes there: what blocks below compute hangs on their weights, and what enters the cut is cut
off from them. If the answer still hangs on any of these weights, something else of theirs has come to it: keys and values that
layers share, what a router says to the loss, a dictionary that lower blocks write into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, told
from layerpeft.integrations.empty import hollow
from layerpeft.integrations.torch import tensors_of
from layerpeft.integrations.tracing import as_traced, unpacked_rows
from layerpeft.selection.states import entering_states
from layerpeft.training.prefix.proof import UPWARDS
from layerpeft.training.prefix.running import MORE, Form, form_of, hands_on


def forms_below(model: nn.Module, names: Sequence[str], cut: int) -> list[Form]:
    """What each block below `cut` gives out besides hidden states, by a traced pass of two tokens.

    Raises: ConfigError where that is more than nothing, or where something of theirs comes to the answer another way.
    """
    traced = hollow(model).eval()
    above = {id(p) for name in names[cut:] for p in traced.get_submodule(name).parameters()}  # blocks may share weights
    for parameter in traced.parameters():
        parameter.requires_grad_(False)
    found: dict[str, Form] = {}
    for name in names[:cut]:
        block = traced.get_submodule(name)
        for parameter in block.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in above)
        block.register_forward_hook(lambda _m, _i, output, name=name: _learn(found, name, output))
    traced.get_submodule(names[cut]).register_forward_pre_hook(_cut_off, with_kwargs=True)
    output: Any = None
    try:
        with torch.device("cpu"), as_traced(traced), unpacked_rows(), torch.enable_grad():
            output = traced(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:  # models raise what they like
        if len(found) < cut:
            raise ConfigError(f"{type(model).__name__} cannot be traced: {told(error, 300)}") from error
    if lost := [name for name in names[:cut] if name not in found]:
        raise ConfigError(f"{type(model).__name__} cannot do without its lower part: {MORE} ({lost[0]})")
    if any(tensor.requires_grad for tensor in tensors_of(output)):
        raise ConfigError(f"{type(model).__name__} cannot do without its lower part: {UPWARDS.format(cut)}")
    return [found[name] for name in names[:cut]]


def _learn(found: dict[str, Form], name: str, output: Any) -> None:
    if hands_on(output):
        found[name] = form_of(output)


def _cut_off(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    hidden = entering_states(args, kwargs)
    if hidden is None:
        return args, kwargs
    alone = hidden.detach()
    return tuple(alone if a is hidden else a for a in args), {k: alone if v is hidden else v for k, v in kwargs.items()}
