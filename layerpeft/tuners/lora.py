"""LoRA on the chosen layers: a type of our own up to the moment of injection, PEFT's own `LoraModel` ever after."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from peft import LoraModel
from torch import nn

from layerpeft import choose, steps
from layerpeft.configs import (
    INIT_WITHOUT_TRACE,
    LayerLoraConfig,
    RecordedLoraConfig,
    exclusions,
    stock_config,
    target_names,
)
from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.peft import LayerPeftType, become_stock, register
from layerpeft.layers import Target, base_of, layer_map
from layerpeft.notes import note
from layerpeft.selection import Select
from layerpeft.targets import match_targets


class LayerLoraModel(LoraModel):
    """Resolves the choice before PEFT injects anything, and then turns into `LoraModel`."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._layerpeft_pool: tuple[Target, ...] | None = None
        if not isinstance(config, LayerLoraConfig):
            return
        keep_cpu_layout(model)
        if config.is_deferred:
            self._layerpeft_pool = _pool(config, model)
            self.peft_config[adapter_name] = _pool_config(config, model, self._layerpeft_pool)
        else:
            self.peft_config[adapter_name] = config.resolve(model)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        live = self.peft_config[adapter_name]
        if isinstance(live, RecordedLoraConfig):
            record = live._layerpeft  # type: ignore[attr-defined]
            live._layerpeft_model = weakref.ref(model)  # type: ignore[attr-defined]
            live._layerpeft_adapter = adapter_name  # type: ignore[attr-defined]
            if record.new_tensors:
                note(f"trained besides, for want of pre-trained values: {', '.join(record.new_tensors)}")
            if live.bias == "all":
                _freeze_biases_elsewhere(model, record.selection.layer_names, record.selection.layers)
            pending = None
            if self._layerpeft_pool is not None:
                select = Select.parse(record.config["select"])
                pending = steps.Pending(model, select, self._layerpeft_pool)
            steps.follow(model, adapter_name, live, self, pending)
        del self._layerpeft_pool
        become_stock(self, LoraModel)


def _pool(config: LayerLoraConfig, model: nn.Module) -> tuple[Target, ...]:
    """All targets of all candidate layers. Raises: ConfigError for options that cannot wait for the first step."""
    problems = Problems(
        "this choice waits for the first optimizer step, and these options cannot; pass batches=… with the config"
    )
    if config.init_lora_weights not in INIT_WITHOUT_TRACE:
        problems.add(f"init_lora_weights={config.init_lora_weights!r} changes what the unchosen layers compute")
    if config.target_parameters:
        problems.add("target_parameters: experts are measured before they are wrapped")
    if config.bias != "none":
        problems.add(f"bias={config.bias!r} means biases in layers that are not chosen yet")
    if config.kasa_config is not None:
        problems.add("kasa_config takes something out of the weights of the unchosen layers")
    problems.raise_if_any(ConfigError)
    select = Select.parse(config.select)
    layers = layer_map(model, select.stack)
    targets = match_targets(layers, target_names(config, layers), exclusions(config, model, layers))
    allowed = set(choose.candidates(select, layers, targets))
    return tuple(t for t in targets if t.layer in allowed)


def _pool_config(config: LayerLoraConfig, model: nn.Module, pool: tuple[Target, ...]) -> RecordedLoraConfig:
    everything = copy.deepcopy(config)
    layers = layer_map(model, Select.parse(config.select).stack)
    selection = choose.make_selection(Select(layers=config_layers(pool), stack=layers.stack), layers, pool, None)
    stock = stock_config(everything, base_of(model), selection)
    stock._layerpeft.selection = None  # type: ignore[attr-defined]
    return stock


def config_layers(pool: tuple[Target, ...]) -> list[int]:
    """The layers that hold the pool's targets, ascending."""
    return sorted({t.layer for t in pool})


def _freeze_biases_elsewhere(model: nn.Module, names: tuple[str, ...], chosen: tuple[int, ...]) -> None:
    """`bias="all"` means all biases of the chosen layers; PEFT has just opened those of the whole model.

    The copies that PEFT trains of `modules_to_save` are whole, biases included.
    """
    prefixes = tuple(f"{names[i]}." for i in chosen)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] != "bias" or ".modules_to_save." in name:
            continue
        if not name.removeprefix("_orig_mod.").startswith(prefixes):
            parameter.requires_grad_(False)


register(LayerPeftType.LAYER_LORA, LayerLoraConfig, LayerLoraModel, "lora_")
