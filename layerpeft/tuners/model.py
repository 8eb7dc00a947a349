"""LoRA on the chosen layers: a type of our own up to the moment of injection, PEFT's own `LoraModel` ever after."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraModel
from torch import nn

from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.peft import LayerPeftType, become_stock, register, watch_loading
from layerpeft.model.layers import Stacks, base_of, stacks_of
from layerpeft.model.names import clean
from layerpeft.quantization.apply import Quantized
from layerpeft.selection import choose, schedule, scoring
from layerpeft.selection.examined import Examined
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
    stored,
    with_lasting_batches,
)
from layerpeft.tuners.stock import RecordedLoraConfig

# initialisations that take a random or data-dependent part out of the base weights, which no later load finds again
INIT_NOT_REPEATABLE = ("pissa_niter", "corda", "lora_ga")


@dataclass(frozen=True)
class Prepared:
    """What an adapter comes to, known before anything of the model is touched.

    `examined`: with the targets of the pool, where layers are chosen later or again; `known`: the scores that a schedule begins
    with; `wanted`: the precisions that are stored before wrapping.
    """

    stock: RecordedLoraConfig
    examined: Examined
    known: list[float] | None = None
    wanted: Quantized | None = None


def prepare(config: LayerLoraConfig, model: nn.Module) -> Prepared:
    """Looks at the model once, and chooses its layers or the pool of a choice that is made later. Raises: as `resolve`."""
    stacks, known = stacks_of(model), None
    if config.is_scheduled:
        examined = scheduled_pool(config, model, stacks)
        known = first_scores(config, model, examined)
        stock = pool_config(config, model, examined)
    elif config.is_deferred:
        examined = waiting_pool(config, model, stacks)
        stock = pool_config(config, model, examined)
    else:
        examined = config.examine(model, stacks)
        stock: Any = config.settled(model, examined=examined)
    return Prepared(stock, examined, known, before_wrapping(config, model, stock._layerpeft.selection, stacks))


class LayerLoraModel(LoraModel):
    """Resolves the choice before PEFT injects anything, and then turns into `LoraModel`."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if not isinstance(config, LayerLoraConfig):
            return
        keep_cpu_layout(model)
        config = with_lasting_batches(config)
        prepared = self._layerpeft_prepared = prepare(config, model)
        live: Any = prepared.stock
        self.peft_config[adapter_name] = live
        live._layerpeft.quantized = stored(config, model, prepared.wanted)
        live._layerpeft_quantize = after_choice(config) if live._layerpeft.selection is None else None
        if config.is_scheduled or live._layerpeft.selection is None:
            watch_loading()

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
            examined, pending, switcher = self._layerpeft_prepared.examined, None, None
            if examined.select.is_scheduled:
                switcher = switching.Switcher(examined, self._layerpeft_prepared.known)
            elif record.selection is None:
                pending = measuring.Pending(model, examined)
            steps.follow(model, adapter_name, live, self, pending, refresher, switcher)
            backward.install(model, examined.layers.stack, examined.blocks)
            del self._layerpeft_prepared
        become_stock(self, LoraModel)

    def _prepared(self, model: nn.Module, live: RecordedLoraConfig, adapter_name: str) -> Any:
        """What a method of its own makes of the wrapped modules, before they are followed."""
        return None


def waiting_pool(config: LayerLoraConfig, model: nn.Module, stacks: Stacks) -> Examined:
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
    found = config.examine(model, stacks)
    return found.among(choose.candidates(found.select, found.layers, found.targets))


def scheduled_pool(config: LayerLoraConfig, model: nn.Module, stacks: Stacks) -> Examined:
    """All targets of all layers that a schedule may ever train. Raises: ConfigError, SelectionError."""
    problems = Problems("layers that change while training, and these options, do not go together")
    if config.bias == "all":
        problems.add("bias='all' means biases outside of what is switched; use bias='lora_only'")
    if config.target_parameters and needs_batches(config.choosing):
        problems.add(
            "target_parameters: experts are not measured once they are wrapped; choose by something other than "
            f"{config.choosing.by}"
        )
    problems.raise_if_any(ConfigError)
    found = config.examine(model, stacks)
    allowed = schedule_of(found.select, found.layers, found.targets).pool
    check_schedule(config, found.layers, allowed)
    return found.among(allowed)


def pool_config(config: LayerLoraConfig, model: nn.Module, examined: Examined) -> RecordedLoraConfig:
    """What PEFT sees of a pool. Its record has a selection where that is all there is to choose: under a schedule."""
    select, layers, pool = examined.select, examined.layers, examined.targets
    whole = Select(layers=sorted({t.layer for t in pool}), stack=layers.stack)
    selection = choose.make_selection(whole, layers, pool, None)
    stock = config.stock_for(base_of(model), selection, examined)
    record = stock._layerpeft  # type: ignore[attr-defined]
    record.selection = pool_selection(select, selection) if select.is_scheduled else None
    return stock


def first_scores(config: LayerLoraConfig, model: nn.Module, examined: Examined) -> list[float] | None:
    """The scores of a schedule before anything trains; None where they wait for the first step's batches."""
    select, layers = examined.select, examined.layers
    if isinstance(select.by, Scores):
        select.by.check(layers)
        return list(select.by.values)
    if not needs_batches(select):
        return [0.0 if v is None else v for v in scoring.measure(model, examined).values]
    if config._batches is None or scoring.live_only(select):
        return None
    return list(scoring.score(model, select, layers, examined.targets, config._batches).values)


def pool_selection(select: Select, selection: Selection) -> Selection:
    """The record of a schedule: every layer that it may ever train, and how it chooses among them."""
    name = select.by.by if isinstance(select.by, Scores) else select.by
    by = "" if schedule.scoreless(select) else f" by {name}"
    every = f"every {select.reselect_steps} steps" if select.reselect_steps != 1 else "every step"
    keep = "as many as the scores say" if select.keep in (None, "auto") else select.keep
    why = f"{keep} of {len(selection.layers)} layers at a time, chosen again {every}{by} (pick: {select.rule})"
    return replace(selection, why=why, select=select.to_dict() | {"by": name})


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
