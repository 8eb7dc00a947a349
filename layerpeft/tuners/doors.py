"""What PEFT's own ways to read, mix and exchange adapters meet where more was trained than the factors they look at."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from layerpeft.errors import ConfigError, SaveError
from layerpeft.integrations.engines.fsdp import give_up
from layerpeft.integrations.peft import (
    AuxiliaryTrainingWrapper,
    watch_bases,
    watch_calls,
    watch_keys,
    watch_loading,
    watch_swaps,
)
from layerpeft.model.names import adapted
from layerpeft.training.carried import KEY
from layerpeft.training.method import Method
from layerpeft.training.record import record_of
from layerpeft.tuners.galore.layer import MIXED
from layerpeft.tuners.unlock.layer import UnlockedNorm


def watch() -> None:
    """Hears of all of them in this process, once."""
    watch_loading()
    watch_keys(adapted)
    watch_swaps(_swapped)
    watch_bases(_base_asked)
    for name, before in (
        ("inject_adapter", _injecting),
        ("_enable_peft_forward_hooks", _hooking),
        ("add_weighted_adapter", _mixing),
        ("disable_adapter_layers", _switching),
        ("enable_adapter_layers", _switching),
        ("set_adapter", _switching),
    ):
        watch_calls(name, before)


def _whole(tuner: Any, adapters: Iterable[str]) -> str | None:
    """The adapter among these of which some was trained into the model's own weights."""
    return next((n for n, method in _bound(tuner, adapters).items() if method.whole), None)


def _bound(tuner: Any, adapters: Iterable[str]) -> dict[str, Method]:
    """The methods of those among these adapters that have one."""
    records = {n: record_of(tuner.peft_config.get(n)) for n in adapters}
    return {n: r.bound for n, r in records.items() if r is not None and r.bound is not None}


def _injecting(tuner: Any, model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> None:
    """Raises: ConfigError where an adapter cannot be a copy, or wants LoRA in weights that train themselves; nothing is changed."""
    record = record_of(tuner.peft_config[adapter_name])
    if record is not None and record.bound is not None and record.bound.adapter != adapter_name:
        record.bound.copied(adapter_name)
    if _whole(tuner, tuner.peft_config.keys() - {adapter_name}) is None:
        return
    for name, module in model.named_modules():
        inside = isinstance(module, AuxiliaryTrainingWrapper)
        if inside and tuner._check_target_module_exists(tuner.peft_config[adapter_name], name):
            raise ConfigError(
                f"the adapter {adapter_name!r} wants LoRA in {name}, whose weights train themselves: merge what was trained "
                "(layerpeft merge, or merge_and_unload) and put the adapter over that, or load it over the base"
            )


def _hooking(tuner: Any, *_: Any, **kwargs: Any) -> None:
    """Raises: ConfigError for a mixed batch, before PEFT hangs up hooks for it, which an error would leave there."""
    if kwargs.get("adapter_names") is not None and _whole(tuner, tuner.peft_config) is not None:
        raise ConfigError(MIXED)


def _switching(tuner: Any, *_: Any, **__: Any) -> None:
    """Weights that change what they hold are not to stay gathered as they were."""
    if _whole(tuner, tuner.peft_config) is not None:
        give_up(tuner.model)


def _mixing(tuner: Any, adapters: list[str], *_: Any, **__: Any) -> None:
    """Raises: ConfigError where factors are not all that one of the adapters has trained."""
    other = next((n for n, method in _bound(tuner, adapters).items() if not method.mixes), None)
    if other is not None:
        raise ConfigError(
            f"add_weighted_adapter mixes LoRA factors, and {other!r} is none, of which it would leave nothing"
        )
    whole = _whole(tuner, adapters)
    if whole is not None:
        raise ConfigError(
            f"add_weighted_adapter mixes LoRA factors, and what {whole!r} trained lies in the weights: save it with "
            "save_pretrained, and mix what PeftModel.from_pretrained and load_adapter make of the folder"
        )


def _swapped(model: nn.Module, adapter: str) -> None:
    record = record_of(getattr(model, "peft_config", {}).get(adapter))
    if record is not None and record.bound is not None:
        record.bound.swapped()


def _base_asked(model: nn.Module) -> set[str]:
    records = map(record_of, getattr(model, "peft_config", {}).values())
    if any(record.bound.covers() for record in records if record is not None and record.bound is not None):
        raise SaveError(
            "the model's own weights hold what was trained just now; read or load the base within: with model.disable_adapter(): …"
        )
    # the copies of norms; what PEFT's own wrappers hold it knows by itself
    inside: Any = getattr(getattr(model, "base_model", model), "model", model)
    return {KEY} | {f"{n}.modules_to_save" for n, m in inside.named_modules() if isinstance(m, UnlockedNorm)}
