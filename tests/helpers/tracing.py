"""Traces of models without storage, kept between tests that ask the same: most of what a plan takes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

from layerpeft.planning import plan, trace

KEPT: dict[tuple[Any, ...], trace.Pass] = {}
TRACE = trace.trace


def keep_traces(patch: pytest.MonkeyPatch) -> None:
    """Each question is traced once, for the same model, as far as one can see, in the same state."""
    for module in (plan, trace):
        patch.setattr(module, "trace", _traced)


def _traced(model: nn.Module, rows: int, length: int, step: Any = None, inputs: Any = None) -> trace.Pass:
    if inputs is not None or not all(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters()):
        return TRACE(model, rows, length, step, inputs)
    key = (rows, length, repr(step), seen(model))
    if key not in KEPT:
        KEPT[key] = TRACE(model, rows, length, step)
    return KEPT[key]


def seen(model: nn.Module) -> tuple[Any, ...]:
    """Modules with their plain attributes and hooks, and tensors with their shapes, types and whether they train."""
    found: list[Any] = []
    for name, module in model.named_modules():
        said = {k: _told(v) for k, v in vars(module).items() if not k.endswith("_hooks")}
        plain = {k: told for k, told in said.items() if told is not None}
        hooks = [len(getattr(module, f"_forward{kind}_hooks")) for kind in ("", "_pre")]
        found.append((name, type(module), repr(plain), *hooks, "forward" in vars(module)))
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found.append((name, type(tensor), tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
    return tuple(found)


def _told(value: Any) -> Any:
    """What a value says where it is plain; None for others."""
    if isinstance(value, partial):
        return value.func.__name__, repr(value.keywords)
    if isinstance(value, Mapping):
        return [(k, _told(v)) for k, v in value.items()]
    plain = isinstance(value, bool | int | float | str | tuple | list | torch.dtype)
    return repr(value) if plain or hasattr(value, "to_json_string") else None
