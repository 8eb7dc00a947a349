"""Biases that an architecture may have and a model of it does not: where its config has a place for them."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layerpeft.errors import SaveError
from layerpeft.integrations.empty import empty_model
from layerpeft.model.names import clean

Places = tuple[tuple[str, ...], list[str]]  # keys of a config, and the linears that get a bias by them


def biased(model: Any, modules: Iterable[str]) -> Places | None:
    """By which keys of its config (attention_bias, mlp_bias, …) a model of this architecture gives all these linears biases, and
    which ones get one by them, in the order of the model.

    None where there are no such keys, or only such as add other tensors, too. No weight is read. `model`: as it is, on any device.
    """
    wanted = set(modules)
    if not isinstance(model, PreTrainedModel):
        return None
    config, keys, given = copy.deepcopy(model.config), [], set[str]()
    there = _parameters(model, config)
    part: Any = config.get_text_config(decoder=True)
    for key in [k for k, v in vars(part).items() if "bias" in k and v is False]:
        if wanted <= given:
            break
        setattr(part, key, True)
        new = {n.removesuffix(".bias") for n in _parameters(model, config) - there if n.endswith(".bias")}
        if new & (wanted - given) and _parameters(model, config) - there == {f"{n}.bias" for n in new}:
            keys.append(key)
            given |= new
            there |= {f"{n}.bias" for n in new}
        else:
            setattr(part, key, False)
    linears = _linears(model)
    held = [n for n in linears if n in given]
    return (tuple(keys), held) if wanted <= given and len(held) == len(given) else None


def with_biases(config: Any, keys: Iterable[str]) -> Any:
    """The config, changed in place to say so."""
    for key in keys:
        setattr(config.get_text_config(decoder=True), key, True)
    return config


def give_biases(model: Any, modules: Iterable[str]) -> None:
    """Gives these linears biases of zero, and others that get one with them, and says so in the config.

    Raises: SaveError where the config has no place for them.
    """
    modules = list(modules)
    found = biased(model, modules)
    if found is None:
        raise SaveError(no_bias(model, modules))
    keys, names = found
    linears = _linears(model)
    for linear in (linears[n] for n in names):
        weight = linear.weight
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=weight.dtype, device=weight.device), False)
    with_biases(model.config, keys)


def no_bias(model: Any, modules: Sequence[str]) -> str:
    """Why the biases of an adapter cannot be merged."""
    return f"the adapter holds biases of {no_place(model, modules)}. Keep the adapter as it is, which PEFT loads"


def no_place(model: Any, modules: Sequence[str]) -> str:
    """These linears, and why they can have no bias."""
    return (
        f"{modules[0]}{f' and {len(modules) - 1} more' if len(modules) > 1 else ''}, which a {type(model).__name__} has no place "
        "for: its config cannot say so (attention_bias, mlp_bias), and no plain model could hold the result"
    )


def _linears(model: nn.Module) -> dict[str, Any]:
    """By their names, the innermost of those that adapters have wrapped."""
    return {clean(n): m for n, m in model.named_modules() if hasattr(m, "in_features")}


def _parameters(model: nn.Module, config: Any) -> set[str]:
    return {n for n, _ in empty_model(type(model), copy.deepcopy(config)).named_parameters()}
