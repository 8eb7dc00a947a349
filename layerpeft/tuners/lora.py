"""LoRA on the chosen layers: a type of our own up to the moment of injection, PEFT's own `LoraModel` ever after."""

from __future__ import annotations

import copy
import os
import weakref
from dataclasses import replace
from typing import Any

from peft import LoraModel
from torch import nn

from layerpeft import backward, choose, save, schedule, steps
from layerpeft.choose import needs_batches
from layerpeft.configs import (
    INIT_WITHOUT_TRACE,
    LayerLoraConfig,
    RecordedLoraConfig,
    write_record,
)
from layerpeft.errors import ConfigError, Problems
from layerpeft.full import adopt
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.peft import LayerPeftType, become_stock, register, watch_loading
from layerpeft.layers import Target, base_of, layer_map
from layerpeft.models import quantized_linears, stored_base
from layerpeft.notes import note
from layerpeft.quant_save import is_saved, load_saved
from layerpeft.quant_training import after_choice, before_wrapping, check_schedule, names_of, with_lasting_batches
from layerpeft.schedule import schedule_of
from layerpeft.scores import Scores
from layerpeft.selection import Select, Selection

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
                    switcher = steps.Switcher(select, layer_map(model, select.stack), pool, self._layerpeft_known)
                else:
                    pending = steps.Pending(model, select, pool)
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
        return [0.0 if v is None else v for v in choose.measure(model, select, pool).values]
    if config._batches is None or choose.live_only(select):
        return None
    return list(choose.score_targets(model, select, pool, config._batches).values)


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
        if not name.removeprefix("_orig_mod.").startswith(prefixes):
            parameter.requires_grad_(False)


def _tie(live: Any, model: nn.Module, adapter_name: str) -> None:
    """Lets the config write the record of its model when it is saved."""
    live._layerpeft_model = weakref.ref(model)
    live._layerpeft_adapter = adapter_name


def load(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, is_trainable: bool = False, **kwargs: Any
) -> Any:
    """A saved adapter on its base model, verified before any weight is read, with the record of what was chosen and why.

    Of a folder that `save_model` wrote: that model, in the precisions it was saved in.

    Without `model` the base is built from what `adapter_config.json` names, quantized as it was when the adapter trained;
    `kwargs` go to PEFT's (and then transformers') `from_pretrained`. With `is_trainable` training is followed and checked again.
    Raises: SaveError for a damaged folder, or a base that does not fit.
    """
    if model is None and is_saved(folder):
        return load_saved(folder, **kwargs)
    if model is None:
        model, kwargs = stored_base(folder, kwargs)
    elif save.read_manifest(folder).get("quant") is not None and not quantized_linears(model):
        note(
            f"{folder} was trained over a base that was quantized by layer, and this one is not: what it computes differs by the "
            "rounding. load(folder) without a model, or layerpeft.quantize(model, folder) before, gives it the same base"
        )
    loaded = save.load_verified(folder, model, is_trainable=is_trainable, **kwargs)
    adapter = kwargs.get("adapter_name", "default")
    live: Any = loaded.peft_config[adapter]
    live.__class__ = RecordedLoraConfig
    tuner: Any = loaded.base_model
    _tie(live, tuner.model, adapter)
    selection = live._layerpeft.selection
    if live._layerpeft.method == "full" and selection is not None:
        adopt(tuner.model, adapter, selection.layer_names, live._layerpeft.config.get("biases", True))
    if is_trainable and live._layerpeft.method == "galore":
        note(
            "trained further, this adapter is ordinary LoRA; a projection goes on where it stopped through load_adapter(folder, "
            "adapter_name) on a model that LayerGaloreConfig has wrapped, as Trainer's resume_from_checkpoint does"
        )
    if is_trainable:
        steps.follow(tuner.model, adapter, live, tuner, None)
        backward.install(tuner.model, live._layerpeft.selection.stack)
    return loaded


def save_record(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes the record beside an adapter that transformers' own `model.save_pretrained` has saved.

    (`PeftModel.save_pretrained` does it by itself.) Raises: ConfigError where nothing was chosen, or no weights are there.
    """
    live = getattr(model, "peft_config", {}).get(adapter_name)
    record = getattr(live, "_layerpeft", None)
    if record is None or record.selection is None:
        raise ConfigError(
            f"the adapter {adapter_name!r} has no choice of layers to record (select='all', or still pending)"
        )
    if not save.has_weights(folder):
        raise ConfigError(f"{folder} holds no weights of an adapter; call model.save_pretrained({str(folder)!r}) first")
    write_record(folder, base_of(model), record, adapter_name)


register(LayerPeftType.LAYER_LORA, LayerLoraConfig, LayerLoraModel, "lora_")
