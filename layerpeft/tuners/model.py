"""LoRA on the chosen layers: a type of our own up to the moment of injection, PEFT's own `LoraModel` ever after."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

from peft import LoraModel
from torch import nn

from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.peft import LayerPeftType, become_stock, register, watch_loading
from layerpeft.model.layers import Target, base_of, layer_map
from layerpeft.model.names import clean
from layerpeft.selection import choose, schedule, scoring
from layerpeft.selection.schedule import schedule_of
from layerpeft.selection.scores import Scores
from layerpeft.selection.scoring import needs_batches
from layerpeft.selection.select import Select, Selection
from layerpeft.text import note
from layerpeft.training import backward, measuring, steps, switching
from layerpeft.tuners.config import INIT_WITHOUT_TRACE, LayerLoraConfig
from layerpeft.tuners.precision import (
    after_choice,
    before_wrapping,
    check_schedule,
    names_of,
    with_lasting_batches,
)
from layerpeft.tuners.stock import RecordedLoraConfig

# initialisations that take a random or data-dependent part out of the base weights, which no later load finds again
INIT_NOT_REPEATABLE = ("pissa_niter", "corda", "lora_ga")


class LayerLoraModel(LoraModel):
    """Resolves the choice before PEFT injects anything, and then turns into `LoraModel`."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._layerpeft_pool: tuple[Target, ...] | None = None
        self._layerpeft_known: list[float] | None = None
        if not isinstance(config, LayerLoraConfig):
            return
        keep_cpu_layout(model)
        config = with_lasting_batches(config)
        stack, may_train = Select.parse(config.select).stack, None
        if config.is_scheduled or config.is_deferred:
            self._layerpeft_pool = pool = scheduled_pool(config, model) if config.is_scheduled else _pool(config, model)
            self._layerpeft_known = first_scores(config, model, pool) if config.is_scheduled else None
            live = self.peft_config[adapter_name] = _pool_config(config, model, pool)
            if config.is_scheduled:
                may_train = names_of(model, stack, config_layers(pool))
            watch_loading()
        else:
            live = self.peft_config[adapter_name] = config.settled(model)
            if config.quantizes:
                selection = live._layerpeft.selection  # type: ignore[attr-defined]
                may_train = names_of(model, selection.stack, selection.layers)
        live._layerpeft.quantized = before_wrapping(config, model, may_train)  # type: ignore[attr-defined]
        live._layerpeft_quantize = after_choice(config) if may_train is None else None  # type: ignore[attr-defined]

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        live = self.peft_config[adapter_name]
        if isinstance(live, RecordedLoraConfig):
            refresher = self._prepared(model, live, adapter_name)
            record = live._layerpeft  # type: ignore[attr-defined]
            _tie(live, model, adapter_name)
            if record.new_tensors:
                note(f"trained besides, for want of pre-trained values: {', '.join(record.new_tensors)}")
            if str(live.init_lora_weights).startswith(INIT_NOT_REPEATABLE):
                note(
                    f"init_lora_weights={live.init_lora_weights!r} cannot be repeated when the adapter is loaded: save it now, "
                    "untrained, and later with path_initial_model_for_weight_conversion=<that folder>"
                )
            if live.bias == "all":
                _freeze_biases_elsewhere(model, record.selection.layer_names, record.selection.layers)
            pending = switcher = None
            if self._layerpeft_pool is not None:
                select, pool = Select.parse(record.config["select"]), self._layerpeft_pool
                if select.is_scheduled:
                    switcher = switching.Switcher(select, layer_map(model, select.stack), pool, self._layerpeft_known)
                else:
                    pending = measuring.Pending(model, select, pool)
            steps.follow(model, adapter_name, live, self, pending, refresher, switcher)
            if record.selection is not None:
                backward.install(model, record.selection.stack)
        del self._layerpeft_pool, self._layerpeft_known
        become_stock(self, LoraModel)

    def _prepared(self, model: nn.Module, live: RecordedLoraConfig, adapter_name: str) -> Any:
        """What a method of its own makes of the wrapped modules, before they are followed."""
        return None


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
    targets = config.targets_in(model, layers)
    allowed = set(choose.candidates(select, layers, targets))
    return tuple(t for t in targets if t.layer in allowed)


def _pool_config(config: LayerLoraConfig, model: nn.Module, pool: tuple[Target, ...]) -> RecordedLoraConfig:
    everything = copy.deepcopy(config)
    layers = layer_map(model, Select.parse(config.select).stack)
    selection = choose.make_selection(Select(layers=config_layers(pool), stack=layers.stack), layers, pool, None)
    stock = everything.stock_for(base_of(model), selection)
    record = stock._layerpeft  # type: ignore[attr-defined]
    record.selection = pool_selection(config, selection) if config.is_scheduled else None
    return stock


def scheduled_pool(config: LayerLoraConfig, model: nn.Module) -> tuple[Target, ...]:
    """All targets of all layers that a schedule may ever train. Raises: ConfigError, SelectionError."""
    problems = Problems("layers that change while training, and these options, do not go together")
    if config.bias == "all":
        problems.add("bias='all' means biases outside of what is switched; use bias='lora_only'")
    select = Select.parse(config.select)
    if config.target_parameters and needs_batches(select):
        problems.add(
            f"target_parameters: experts are not measured once they are wrapped; choose by something other than {select.by}"
        )
    problems.raise_if_any(ConfigError)
    layers = layer_map(model, select.stack)
    targets = config.targets_in(model, layers)
    allowed = set(schedule_of(select, layers, targets).pool)
    check_schedule(config, layers, allowed)
    return tuple(t for t in targets if t.layer in allowed)


def first_scores(config: LayerLoraConfig, model: nn.Module, pool: tuple[Target, ...]) -> list[float] | None:
    """The scores of a schedule before anything trains; None where they wait for the first step's batches."""
    select = Select.parse(config.select)
    if isinstance(select.by, Scores):
        select.by.check(layer_map(model, select.stack))
        return list(select.by.values)
    if not needs_batches(select):
        return [0.0 if v is None else v for v in scoring.measure(model, select, pool).values]
    if config._batches is None or scoring.live_only(select):
        return None
    return list(scoring.score_targets(model, select, pool, config._batches).values)


def pool_selection(config: LayerLoraConfig, selection: Selection) -> Selection:
    """The record of a schedule: every layer that it may ever train, and how it chooses among them."""
    select = Select.parse(config.select)
    name = select.by.by if isinstance(select.by, Scores) else select.by
    by = "" if schedule.scoreless(select) else f" by {name}"
    every = f"every {select.reselect_steps} steps" if select.reselect_steps != 1 else "every step"
    keep = "as many as the scores say" if select.keep in (None, "auto") else select.keep
    why = f"{keep} of {len(selection.layers)} layers at a time, chosen again {every}{by} (pick: {select.rule})"
    return replace(selection, why=why, select=select.to_dict() | {"by": name})


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
        if not clean(name).startswith(prefixes):
            parameter.requires_grad_(False)


def _tie(live: Any, model: nn.Module, adapter_name: str) -> None:
    """Lets the config write the record of its model when it is saved."""
    live._layerpeft_model = weakref.ref(model)
    live._layerpeft_adapter = adapter_name


register(LayerPeftType.LAYER_LORA, LayerLoraConfig, LayerLoraModel, "lora_")
