"""Tensors that have a shape and no storage, for tracing what a model would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def as_traced(model: nn.Module, device: str = "cpu") -> Iterator[None]:
    """Turns the tensors of a model on the meta device into traced ones, in place; the model runs inside this context.

    They say that they lie on `device`, so that the attention of that device is traced. Experts are traced in their grouped form,
    since a loop over those that tokens reach cannot be.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def traced(t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return FakeTensor(mode, torch.empty_like(t, device="meta"), torch.device(device))

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(traced(parameter.data), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = traced(buffer)
    with mode, _grouped_experts(model):
        yield


@contextmanager
def _grouped_experts(model: Any) -> Iterator[None]:
    from transformers.integrations import moe

    kept, before = moe._grouped_mm, getattr(getattr(model, "config", None), "_experts_implementation", None)
    switched = before == "eager" and _takes_grouped(model)
    moe._grouped_mm = _all_by_one
    try:
        yield
    finally:
        moe._grouped_mm = kept
        if switched:
            model.set_experts_implementation(before)


def _takes_grouped(model: Any) -> bool:
    try:
        model.set_experts_implementation("grouped_mm")
    except ValueError:  # a model without experts says "eager" as well
        return False
    return True


def _all_by_one(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Every row through one expert: as many operations and bytes as each through its own; torch's own takes bfloat16 alone here."""
    return input.to(weight.dtype) @ weight[0]
