"""A model without weights: its classes, names and shapes, and no memory."""

import copy
from typing import Any

import torch
from torch import nn


def empty_model(kind: Any, config: Any, dtype: torch.dtype | str | None = None, **options: Any) -> nn.Module:
    """The model of a config on the meta device, in the type of number that it would be loaded in.

    `kind`: a class of transformers, automatic or a model's own; `dtype`: its name or itself, another name for that of the config.
    """
    make = getattr(kind, "from_config", None) or kind._from_config
    asked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        return make(config, dtype=asked or getattr(config, "dtype", None) or torch.float32, **options)


def hollow(model: nn.Module) -> nn.Module:
    """A copy of any model on the meta device, of which no tensor is copied."""
    tensors = {id(t): torch.empty_like(t, device="meta") for t in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(tensors[id(parameter)], parameter.requires_grad)
    return copy.deepcopy(model, tensors)  # type: ignore[arg-type]
