"""A model without weights: its classes, names and shapes, and no memory."""

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights


def empty_model(kind: Any, config: Any, dtype: torch.dtype | str | None = None, **options: Any) -> nn.Module:
    """The model of a config on the meta device, in the type of number that it would be loaded in.

    `kind`: a class of transformers, automatic or a model's own; `dtype`: its name or itself, another name for that of the config.
    """
    make = getattr(kind, "from_config", None)
    if make is None:  # a class is its own code
        make = kind._from_config
        options.pop("trust_remote_code", None)
    asked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    with torch.device("meta"), no_init_weights():  # numbers that nobody holds need not be drawn
        model = make(config, dtype=asked or getattr(config, "dtype", None) or torch.float32, **options)
    model.tie_weights(recompute_mapping=False)  # which is done where numbers are drawn
    return model


def hollow(model: nn.Module) -> nn.Module:
    """A copy of any model on the meta device, of which no tensor is copied."""
    tensors = {id(t): torch.empty_like(t, device="meta") for t in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(tensors[id(parameter)], parameter.requires_grad)
    return copy.deepcopy(model, tensors)  # type: ignore[arg-type]


def twin(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class and of another config, without weights, to be saved as this one would be.

    It goes by the same kind of attention, and knows how the names in files differ from those in memory.
    """
    new: Any = empty_model(type(model), config, getattr(model, "dtype", None))
    with suppress(ValueError, AttributeError):
        new.set_attn_implementation(model.config._attn_implementation)  # type: ignore[union-attr]
    for name in ("_weight_conversions", "generation_config"):
        if name in vars(model):
            setattr(new, name, copy.deepcopy(vars(model)[name]))
    return new
