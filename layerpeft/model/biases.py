"""Biases that an architecture may have and a model of it does not: where its config has a place for them."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from layerpeft.errors import SaveError
from layerpeft.integrations.empty import empty_model
from layerpeft.model.names import clean

KEYS = ("attention_bias", "use_bias", "bias")  # by which configs say that linears of attention have biases


def biased(model: Any, modules: Iterable[str]) -> tuple[str, list[str]] | None:
    """By which key of its config a model of this architecture gives all these linears biases, and which others get one with them.

    None where there is no such key. No weight is read. `model`: as it is, on any device.
    """
    modules, linears = set(modules), {clean(n): m for n, m in model.named_modules() if hasattr(m, "in_features")}
    for key in KEYS:
        config = copy.deepcopy(model.config)
        part = config.get_text_config(decoder=True)
        if getattr(part, key, None) is not False:
            continue
        setattr(part, key, True)
        there = {n for n, m in empty_model(type(model), config).named_modules() if getattr(m, "bias", None) is not None}
        new = [n for n in linears if n in there and linears[n].bias is None]
        if modules <= set(new):
            return key, new
    return None


def give_biases(model: Any, modules: Iterable[str]) -> None:
    """Gives these linears biases of zero, and others that get one with them, and says so in the config.

    Raises: SaveError where the config has no place for them.
    """
    modules = list(modules)
    found = biased(model, modules)
    if found is None:
        raise SaveError(no_place(model, modules))
    key, names = found
    linears = {clean(n): m for n, m in model.named_modules() if hasattr(m, "in_features") and hasattr(m, "weight")}
    for linear in (linears[n] for n in names):
        weight = linear.weight
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=weight.dtype, device=weight.device), False)
    setattr(model.config.get_text_config(decoder=True), key, True)


def no_place(model: Any, modules: Sequence[str]) -> str:
    """Why the bias of an adapter cannot be merged."""
    return (
        f"the adapter holds biases of {modules[0]}{f' and {len(modules) - 1} more' if len(modules) > 1 else ''}, which a "
        f"{type(model).__name__} has no place for: its config cannot say so (attention_bias), and no plain model could hold the "
        "result. Keep the adapter as it is, which PEFT loads"
    )
