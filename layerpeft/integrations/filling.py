"""transformers' own loading of a checkpoint, in which every chosen linear is stored otherwise as soon as it has been read.

`from_pretrained` reads a checkpoint lazily, tensor by tensor, and hands each of them to a quantizer, for which it has a public
registry. Going through it, everything else is as without: conversion of older formats, tied weights, buffers, new heads, marks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from layerpeft.errors import ConfigError, Problems, hint

METHOD = "layerpeft"
LOADED_MARK = "_is_hf_initialized"  # on tensors and modules that have their values, so that nothing is drawn over them
PREFIX = "packed_"  # of the tensors of a packed linear, in a checkpoint
Store = Callable[[str, nn.Linear], nn.Module]  # name and linear, with its weight -> what takes its place


@dataclass(frozen=True)
class Packed:
    """A linear in a checkpoint: type and shape of its tensors, and what makes the module of them."""

    tensors: Mapping[str, tuple[str, list[int]]]
    join: Callable[[nn.Linear, dict[str, torch.Tensor]], nn.Module]


class Settings(QuantizationConfigMixin):
    """The quantizer's config: what is to be done while a checkpoint loads; it never outlives that."""

    def __init__(
        self, store: Any = None, stored: Any = (), size: Any = None, why_not: Any = None, packed: Any = None,
        before: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        self.quant_method: Any = METHOD
        self.store, self.stored, self.size, self.why_not, self.packed = store, stored, size, why_not, packed or {}
        self.before = before

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class Place(ConversionOps):
    """Stores a linear, and leaves a weight without numbers in its place until the rest of the model is there."""

    def __init__(self, store: Store, made: dict[str, nn.Module]) -> None:
        self.store, self.made = store, made

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, model: Any, missing_keys: Any, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        left: dict[str, Any] = {}
        for key in list(input_dict):
            value = input_dict.pop(key)
            value = value[0] if isinstance(value, list) else value
            name = key.rpartition(".")[0]
            linear = model.get_submodule(name)
            if value.shape != linear.weight.shape:
                ours = tuple(linear.weight.shape)
                raise ValueError(f"{key} is {tuple(value.shape)} in the checkpoint and {ours} in the model")
            if linear.bias is not None and linear.bias.is_meta:  # not read yet, or not there: stored afterwards
                left[key] = value
                continue
            hollow = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
            linear.weight = nn.Parameter(value, requires_grad=False)
            del value
            self.made[name] = marked(self.store(name, linear))
            linear.weight = hollow
            marked(linear)
            missing_keys.discard(key)
        return left


class Quantizer(HfQuantizer):
    """Stores each linear as it comes, and leaves no trace of itself on the model."""

    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.made: dict[str, nn.Module] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        name, _, kind = param_name.rpartition(".")
        return kind == "weight" and name in self.quantization_config.stored

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> None:
        """What was stored by layerpeft is read as it was stored, also where it is not all of one type."""

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        return self.quantization_config.size(param_name.rpartition(".")[0], param)

    def get_quantize_ops(self) -> Any:
        return Place(self.quantization_config.store, self.made)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        asked = self.quantization_config
        if asked.before is not None:
            asked.before(model)
        _check(model, (*asked.stored, *asked.packed), asked.why_not)
        for name, packed in asked.packed.items():
            _hollow(model.get_submodule(name), packed.tensors)

    def postprocess_model(self, model: Any, **_: Any) -> None:
        for name in self.quantization_config.stored:
            linear = model.get_submodule(name)
            made = self.made.pop(name, None)
            if made is None:  # its bias came late
                made = marked(self.quantization_config.store(name, linear))
            model.set_submodule(name, made.train(linear.training))
        for name, packed in self.quantization_config.packed.items():
            linear = model.get_submodule(name)
            tensors = {key: linear._buffers.pop(f"{PREFIX}{key}") for key in packed.tensors}
            model.set_submodule(name, marked(packed.join(linear, tensors)))
        self.remove_quantization_config(model)
        vars(model).pop("is_quantized", None)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


@cache
def _registered() -> None:
    """Enters the two in transformers' registry, at the first use."""
    register_quantization_config(METHOD)(Settings)
    register_quantizer(METHOD)(Quantizer)


def settings(
    store: Store,
    names: Iterable[str],
    size: Callable[[str, torch.Tensor], float],
    why_not: Callable[[str, nn.Linear], str | None] | None = None,
    before: Callable[[nn.Module], None] | None = None,
) -> Any:
    """What `from_pretrained(quantization_config=…)` takes so that the linears of these names go through `store`.

    Their biases are there by then (transformers reads tensors in the order of names). `size`: bytes of a weight, once stored, for
    each number in it; `why_not`: what keeps a linear, without numbers yet, from being stored; `before`: changes the
    model, without numbers, before anything is read; tensors of modules that it takes out are left in their files.
    """
    _registered()
    return Settings(store, frozenset(names), size, why_not, before=before)


def stored_settings(packed: Mapping[str, Packed]) -> dict[str, Any]:
    """What a config's `quantization_config` has to be so that `from_pretrained` reads linears that are packed already."""
    _registered()
    return {"quant_method": METHOD, "packed": packed}


def _hollow(linear: nn.Linear, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Puts the packed tensors' places into a linear; its weight stays as a name alone, for models that ask for it meanwhile."""
    weight = linear._parameters.pop("weight")
    vars(linear)["weight"] = weight
    setattr(weight, LOADED_MARK, True)
    for key, (dtype, shape) in tensors.items():
        linear.register_buffer(
            f"{PREFIX}{key}", torch.empty(shape, dtype=getattr(torch, dtype), device="meta"), persistent=True
        )


def _check(model: nn.Module, names: Iterable[str], why_not: Any) -> None:
    """Raises: ConfigError naming everything that is not a plain linear of the model, or cannot be stored."""
    modules = dict(model.named_modules())
    problems = Problems(f"{type(model).__name__} cannot be stored so")
    for name in sorted(names):
        module = modules.get(name)
        if module is None:
            problems.add(f"it has no module {name!r}{hint(name, modules, '; did you mean {!r}?')}")
        elif type(module) is not nn.Linear:
            problems.add(f"{name} is of the class {type(module).__name__}; only plain linears are quantized")
        elif why_not is not None and (why := why_not(name, module)):
            problems.add(f"{name}: {why}")
    problems.raise_if_any(ConfigError)


def marked(module: nn.Module) -> nn.Module:
    """The module, with the mark on it and its tensors that they have their values."""
    for tensor in (*module.parameters(), *module.buffers()):
        setattr(tensor, LOADED_MARK, True)
    setattr(module, LOADED_MARK, True)
    return module


@contextmanager
def quiet_bars(quiet: bool) -> Iterator[None]:
    """Inside, transformers shows no progress bars of its own."""
    shown = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and shown:
            logging.enable_progress_bar()
