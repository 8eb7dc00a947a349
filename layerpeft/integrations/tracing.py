"""Tensors that have a shape and no storage, for tracing what a model would do."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


def as_traced(model: nn.Module, device: str = "cpu") -> AbstractContextManager[object]:
    """Turns the tensors of a model on the meta device into traced ones, in place; the model runs inside the context given back.

    They say that they lie on `device`, so that the attention of that device is traced.
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
    return mode
