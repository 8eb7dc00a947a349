"""What a method that trains LoRA factors tells those who follow it: its tensors, target by target."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import nn

from layerpeft.integrations.peft import adapter_parameters, let_rest, lora_layers, unwrap_layer
from layerpeft.model.names import clean
from layerpeft.training.method import Tensors
from layerpeft.tuners.full.layer import full_layers, full_parameters, unwrap


def trained_tensors(model: nn.Module, adapter: str, bias: str = "none") -> Tensors:
    """Target -> the adapter's tensors in it, with the bias that LoRA trains; the weights themselves where those train."""
    found: Tensors = {}
    for name, layer in lora_layers(model, adapter).items():
        target = _target(name, layer)
        group = adapter_parameters(layer, adapter)
        own = getattr(layer.get_base_layer(), "bias", None) if bias == "lora_only" else None
        found[target] = group | ({"bias": own} if isinstance(own, nn.Parameter) else {})
    for name, wrapper in full_layers(model, adapter).items():
        held = full_parameters(wrapper)
        if held:
            found[name] = held
    return found


def _target(name: str, layer: Any) -> str:
    parameter = getattr(layer, "parameter_name", None)
    return f"{clean(name)}.{parameter}" if parameter else clean(name)


def rest_but(model: nn.Module, adapter: str, training: Set[str] | None) -> None:
    """Lets LoRA modules rest that are not among these targets (None: none rests), whatever PEFT switches off and on meanwhile."""
    for name, layer in lora_layers(model, adapter).items():
        let_rest(layer, adapter, training is not None and _target(name, layer) not in training)


def wrapped_names(model: nn.Module, adapter: str) -> set[str]:
    """The modules that the adapter wraps, by their name in the unwrapped model."""
    return {*map(clean, lora_layers(model, adapter)), *full_layers(model, adapter)}


def unwrap_others(model: nn.Module, adapter: str, chosen: Set[str]) -> bool:
    """Takes the adapter off every target that is not among these; whether it trains the weights themselves."""
    for name in list(lora_layers(model, adapter)):
        if clean(name) not in chosen:
            unwrap_layer(model, name, adapter)
    whole = full_layers(model, adapter)
    for name in whole.keys() - chosen:
        unwrap(model, name, adapter)
    return bool(whole)
