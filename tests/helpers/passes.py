"""Passes that begin at a layer, as those of later epochs do where states were kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from layerpeft import LayerMap
from layerpeft.model.layers import base_of


@contextmanager
def beginning_at(layer: int, model: nn.Module, layers: LayerMap, given: Mapping[str, Any]) -> Iterator[None]:
    """Blocks below hand on what they are given, in the form in which they otherwise give it."""
    blocks = [base_of(model).get_submodule(name) for name in layers.names[:layer]]
    outputs: dict[nn.Module, Any] = {}
    handles = [b.register_forward_hook(lambda b, _, output: outputs.update({b: output})) for b in blocks]
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    for block in blocks:
        rest = outputs[block][1:] if isinstance(outputs[block], tuple) else None
        block.forward = partial(_hand_on, rest)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _hand_on(rest: tuple[Any, ...] | None, *given: Any, **named: Any) -> Any:
    states = given[0] if given else named["hidden_states"]
    return states if rest is None else (states, *rest)
