"""Every name of PEFT that layerpeft relies on and PEFT does not promise to keep; `tests/integrations/` fails first."""

import enum
import functools
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftModel, PeftType
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    hotswap,
    save_and_load,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from layerpeft.errors import SaveError
from layerpeft.integrations.bitsandbytes import find_packing
from layerpeft.integrations.engines.known import is_cut, whole
from layerpeft.integrations.torch import in_states

__all__ = [
    "DUMMY_TARGET_MODULES", "AuxiliaryTrainingWrapper", "BaseTunerLayer", "LoraLinear", "LoraVariant", "ModulesToSaveWrapper",
]  # fmt: skip

BASE_BIAS = ".base_layer.bias"  # how the name of a wrapped module's own bias ends
HEADS = ("classifier", "score", "qa_outputs")  # what PEFT adds to modules_to_save, whether it is there or not


class LayerPeftType(str, enum.Enum):  # noqa: UP042 - PEFT compares and serialises its types as (str, Enum) members
    """Types of our own beside PEFT's closed list; PEFT's tables take them because they hash and compare as strings."""

    LAYER_LORA = "LAYER_LORA"
    LAYER_GALORE = "LAYER_GALORE"
    LAYER_FULL = "LAYER_FULL"
    LAYER_HEAD = "LAYER_HEAD"
    LAYER_UNLOCK = "LAYER_UNLOCK"
    LAYER_QUANT = "LAYER_QUANT"

    def __str__(self) -> str:
        """What PEFT prints where it takes stock types only: on a model that already has adapters, or with `mixed=True`."""
        if self is LayerPeftType.LAYER_GALORE:
            return f"{self.value} (gradient projection takes a model without other adapters)"
        if self is LayerPeftType.LAYER_FULL:
            return f"{self.value} (training the weights themselves takes a model without other adapters)"
        if self is LayerPeftType.LAYER_HEAD:
            return f"{self.value} (training offsets of heads takes a model without other adapters)"
        if self is LayerPeftType.LAYER_UNLOCK:
            return f"{self.value} (unlocking norms and linears takes a model without other adapters)"
        return f"{self.value} (its layers are not chosen yet: pass config.resolve(model, batches=…) instead)"


def register(kind: enum.Enum, config: type, tuner: type, prefix: str) -> None:
    """Enters a method in PEFT's four tables; a second call changes nothing. `kind`: a member of a `str` enum."""
    PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, config)  # type: ignore[arg-type]
    PEFT_TYPE_TO_TUNER_MAPPING.setdefault(kind, tuner)  # type: ignore[arg-type]
    PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(kind, prefix)  # type: ignore[arg-type]


def default_targets(model_type: str) -> list[str] | str | None:
    """The module names that PEFT wraps with LoRA when none are given; None where it knows none."""
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)


def renamed_leaves(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Last segments of module names that PEFT, on this model, takes for the experts of older transformers, in every layer."""
    found = set()
    for leaf in {name.rpartition(".")[2] for name in names}:
        trial = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(trial, model=model, conversions=None)
        except ValueError:  # PEFT wants the other half of a fused pair, which is the same mistake
            found.add(leaf)
        if trial.target_modules != {leaf}:
            found.add(leaf)
    return found


def refused_leaves(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Last segments of module names that PEFT does not wrap on this model: what its kernels use without calling (Mamba)."""
    found = set()
    for leaf in {name.rpartition(".")[2] for name in names}:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, leaf)
        except ValueError:
            found.add(leaf)
    return found


def dequantized(module: nn.Module) -> torch.Tensor:
    """The weight of a linear as numbers, as stored, for quantized and plain modules alike."""
    find_packing(module)
    state: Any = getattr(module, "state", None)
    if not hasattr(state, "SCB"):
        return dequantize_module_weight(module)
    # PEFT puts another weight into an int8 module on a CPU, without the scales that the next forward pass looks for
    weight, codes, scales, kept = module.weight, state.CB, state.SCB, getattr(module.weight, "SCB", None)
    try:
        return dequantize_module_weight(module)
    finally:
        module.weight = weight  # type: ignore[assignment]
        state.CB, state.SCB = codes, scales
        if kept is not None:
            weight.SCB = kept  # type: ignore[union-attr]


@dataclass(frozen=True)
class Factors:
    """What a LoRA layer adds to its weight (out, in) is `scale`·B·A; `a`: (rank, in), `b`: (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Those of the change, in float32 at least."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        return self.scale * (self.b[start:stop].detach().to(wide) @ self.a.detach().to(wide))


# Whose `get_delta_weight` is the product of two matrices, or that transposed.
_OF_FACTORS = {
    f"peft.tuners.lora.{name}.get_delta_weight"
    for name in ("layer.Linear", "layer.Embedding", "bnb.Linear8bitLt", "bnb.Linear4bit", "hqq.HqqLoraLinear")
}


def factors_of(layer: Any, adapter: str) -> Factors | None:
    """Those of an adapter in a tuner layer; None where its change is made otherwise (of convolutions, experts, other methods)."""
    made = type(layer).get_delta_weight
    if f"{made.__module__}.{made.__qualname__}" not in _OF_FACTORS:
        return None
    scale = float(layer.scaling[adapter])
    if adapter in layer.lora_embedding_A:
        return Factors(layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], scale)
    return Factors(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, scale)


def changes_weights(kind: str) -> bool:
    """Whether adapters of a type of PEFT's change what weights compute; others add to what the model reads."""
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)  # type: ignore[call-overload]
    reads = config is not None and (issubclass(config, PromptLearningConfig) or config.__name__ == "CPTConfig")
    return not reads and kind != PeftType.ADAPTION_PROMPT


def scale_of(config: Any, name: str, rank: int) -> float:
    """By what PEFT multiplies the factors of a module (by its name in the base) that have this rank."""
    alphas = getattr(config, "alpha_pattern", None) or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)


def stock_of(config: type) -> tuple[PeftType, type[BaseTuner]]:
    """The type that PEFT has for a config class of its own, or for what is built on one, and the tuner of that."""
    names = {kind: name for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = next(names[base] for base in config.__mro__ if base in names)
    return name, PEFT_TYPE_TO_TUNER_MAPPING[name]


def become_stock(tuner: BaseTuner, kind: PeftType, stock: type[BaseTuner]) -> None:
    """Turns a tuner of ours into PEFT's own, and tells the PeftModel that is about to hold it.

    The registration hook is the one public moment at which the PeftModel and its tuner meet; it removes itself, also when
    no PeftModel ever takes the tuner (transformers' `add_adapter`).
    """
    tuner.__class__ = stock
    reference = weakref.ref(tuner)

    def on_register(parent: nn.Module, _name: str, child: Any) -> None:
        if child is not None and child is reference():
            handle.remove()
            if isinstance(parent, PeftModel):
                parent.peft_type = kind

    handle = register_module_module_registration_hook(on_register)  # type: ignore[arg-type]
    weakref.finalize(tuner, handle.remove)


_loading: ContextVar[str | None] = ContextVar("layerpeft_loading", default=None)


def loading_folder() -> str | None:
    """The folder whose adapter `PeftModel.load_adapter` is reading right now; None where nothing is, or the folder is not here."""
    return _loading.get()


@contextmanager
def reading(folder: str | None) -> Iterator[None]:
    """Inside, that is the folder whose adapter is read, by somebody else than PEFT."""
    token = _loading.set(folder)
    try:
        yield
    finally:
        _loading.reset(token)


@functools.cache
def watch_loading() -> None:
    """Lets `loading_folder` know: PEFT hands its hooks the tensors and not the folder. A second call changes nothing."""
    original = PeftModel.load_adapter

    @functools.wraps(original)
    def load_adapter(self: PeftModel, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        folder = os.path.join(os.fspath(model_id), kwargs.get("subfolder") or "")
        with reading(folder if os.path.isdir(folder) else None):
            return original(self, model_id, *args, **kwargs)

    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign]


_left: ContextVar[str | None] = ContextVar("layerpeft_left", default=None)


@contextmanager
def leaving(end: str | None) -> Iterator[None]:
    """Inside, tensors of an adapter's file whose names end so are not loaded, once `watch_keys` was called."""
    token = _left.set(end)
    try:
        yield
    finally:
        _left.reset(token)


@functools.cache
def watch_wrapping(around: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    """Runs whatever wraps a model for an adapter, by any door, inside `around(model)`. A second call changes nothing."""
    original = BaseTuner.inject_adapter

    @functools.wraps(original)
    def inject_adapter(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with around(model):
            return original(self, model, *args, **kwargs)

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


CUT = (
    "the weights are divided among the processes (fully_shard, ZeRO-3), and one process holds a part of each only; gather them in "
    "every process, state = accelerator.get_state_dict(model), or without Accelerate get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) from torch.distributed.checkpoint.state_dict, and then save "
    "in the first one: model.save_pretrained(folder, state_dict=state)"
)


_saving: ContextVar[bool] = ContextVar("layerpeft_saving", default=False)
is_saving = _saving.get  # whether `PeftModel.save_pretrained` is writing just now
_given: ContextVar[Mapping[str, Any] | None] = ContextVar("layerpeft_given", default=None)
given_state = _given.get  # the `state_dict` that it was given; None where it was given none


@functools.cache
def watch_saving(is_part: Callable[[Any], bool]) -> None:
    """Lets `PeftModel.save_pretrained` refuse parts of weights before it writes anything. A second call changes nothing."""
    original = PeftModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("state_dict")
        followed = getattr(vars(self.get_base_model()).get("_layerpeft"), "tether", None) is not None
        tensors = self.parameters() if given is None else given.values()
        if followed and any(map(is_part, tensors)):
            raise SaveError(CUT)
        token, state = _saving.set(True), _given.set(given)
        try:
            return original(self, *args, **kwargs)
        finally:
            _saving.reset(token)
            _given.reset(state)

    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


@functools.cache
def spare_tables() -> None:
    """Lets `PeftModel.save_pretrained` save models that read no tokens: where their number of outputs is another than in the base's
    config, PEFT would save embeddings, and asks for them. A second call changes nothing."""
    original = PeftModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        try:
            self.get_base_model().get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:
            kwargs.setdefault("save_embedding_layers", False)
        except AttributeError:
            pass
        return original(self, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def whole_state(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """What `PeftModel.save_pretrained` takes as `state_dict` of weights that are divided among processes: all but the base's frozen
    ones, whole, on the CPU. Every process must ask. None where nothing is divided."""
    state = model.state_dict(keep_vars=True)
    if not any(map(is_cut, state.values())):
        return None
    marks = (str(model.base_model.prefix), ".modules_to_save.", ".trainable_tokens_")
    kept = {k: t for k, t in state.items() if t.requires_grad or any(mark in k for mark in marks) or not is_cut(t)}
    return {k: whole(t).detach().cpu() for k, t in kept.items()}


@functools.cache
def watch_states(whole: Callable[..., dict[str, Any]]) -> None:
    """Lets `get_peft_model_state_dict` give what `whole(model, config, adapter, found)` says in the place of what it found; None:
    nothing.

    A second call changes nothing.
    """
    original: Any = LoraModel._get_adapter_state_dict.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def _get_adapter_state_dict(cls: Any, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        found = original(cls, model, config, adapter_name, *args, **kwargs)
        every = found | whole(model, config, adapter_name, found)
        return {k: v for k, v in every.items() if v is not None}

    LoraModel._get_adapter_state_dict = classmethod(_get_adapter_state_dict)  # type: ignore[assignment]


@functools.cache
def watch_keys(plain: Callable[[str], str]) -> None:
    """Lets saved keys be `plain`, whatever has been put around modules, and finds the place of those of any file in any model.

    Some wrappers (activation checkpointing) leave their own name out of state dicts, where PEFT looks for it. A second call
    changes nothing.
    """
    prefixes: Any = tuners_utils._get_tuner_state_dict_key_prefixes
    collect: Any = BaseTuner._get_adapter_state_dict.__func__  # type: ignore[attr-defined]
    remove: Any = BaseTuner._remove_adapter_name_from_key.__func__  # type: ignore[attr-defined]
    remap: Any = BaseTuner._remap_adapter_state_dict_for_load.__func__  # type: ignore[attr-defined]

    @functools.wraps(prefixes)
    def _get_tuner_state_dict_key_prefixes(*args: Any, **kwargs: Any) -> Any:
        found = prefixes(*args, **kwargs)
        return found | {in_states(p) for p in found}

    @functools.wraps(collect)
    def _get_adapter_state_dict(
        cls: Any, model: Any, config: Any, adapter_name: str, state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for name, _ in model.named_parameters(remove_duplicate=False):
            if name not in state_dict and (given := state_dict.get(in_states(name))) is not None:
                state_dict[name] = given  # where PEFT looks for trained copies next
        return collect(cls, model, config, adapter_name, state_dict, *args, **kwargs)

    @functools.wraps(remove)
    def _remove_adapter_name_from_key(cls: Any, key: str, adapter_name: str) -> str:
        return plain(remove(cls, key, adapter_name))

    @functools.wraps(remap)
    def _remap_adapter_state_dict_for_load(
        cls: Any, model: Any, config: Any, adapter_name: str, state_dict: Any
    ) -> Any:
        left = _left.get()
        found = {plain(k): v for k, v in state_dict.items() if left is None or not k.endswith(left)}
        found = remap(cls, model, config, adapter_name, found)
        names = {plain(n): n for n in model.state_dict() if plain(n) != n}
        for name, module in model.named_modules():  # trained copies, whose files have the names of the originals
            if isinstance(module, AuxiliaryTrainingWrapper) and plain(name) != name:
                names |= {f"{plain(name)}.{n}": f"{in_states(name)}.{n}" for n in module.original_module.state_dict()}
        return {names.get(k, k): v for k, v in found.items()}

    tuners_utils._get_tuner_state_dict_key_prefixes = _get_tuner_state_dict_key_prefixes
    BaseTuner._get_adapter_state_dict = classmethod(_get_adapter_state_dict)  # type: ignore[assignment]
    BaseTuner._remove_adapter_name_from_key = classmethod(_remove_adapter_name_from_key)  # type: ignore[assignment]
    BaseTuner._remap_adapter_state_dict_for_load = classmethod(_remap_adapter_state_dict_for_load)  # type: ignore[assignment]


@functools.cache
def watch_swaps(swap: Callable[[nn.Module, str], None]) -> None:
    """Lets `hotswap_adapter` call `swap(model, adapter)` before it puts other weights there, unless PEFT will refuse them.

    A second call changes nothing.
    """
    original = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(
        model: Any, state_dict: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        merged = any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, BaseTunerLayer))
        if not merged and all(_has(model, key) for key in state_dict):
            swap(model, adapter_name)
        return original(model, state_dict, adapter_name, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict


def _has(model: nn.Module, name: str) -> bool:
    try:
        return operator.attrgetter(name)(model) is not None
    except AttributeError:
        return False


@functools.cache
def watch_calls(name: str, before: Callable[..., None]) -> None:
    """Lets a method of PEFT's LoRA tuner call `before` with its own arguments, the tuner first. A second call changes nothing."""
    owner = next(kind for kind in LoraModel.__mro__ if name in vars(kind))  # where others may listen, too
    original = getattr(owner, name)

    @functools.wraps(original)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(owner, name, called)


@functools.cache
def watch_bases(ask: Callable[[nn.Module], set[str]]) -> None:
    """Lets `get_base_model_state_dict` and its twin call `ask(model)`, which gives prefixes of keys that are none of the base's.

    A second call changes nothing.
    """
    original: Any = save_and_load._get_adapter_state_dict_key_prefixes

    @functools.wraps(original)
    def _get_adapter_state_dict_key_prefixes(model: Any) -> set[str]:
        return original(model) | ask(model)

    save_and_load._get_adapter_state_dict_key_prefixes = _get_adapter_state_dict_key_prefixes


def lora_layers(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """Wrapped modules of an adapter by their name in the model (without `base_model.model.`)."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.r}


class _Resting(tuple[str, ...]):
    """What of a module rests, in the place of PEFT's own list of what a variant never trains (`never`)."""

    never: tuple[str, ...] = ()


def let_rest(layer: LoraLayer, adapter: str, resting: bool) -> None:
    """Freezes one adapter's tensors in one module, also when PEFT switches the adapter off and on; or lets them train again."""
    names = never = _never(layer, adapter)
    if resting:
        names = _Resting(layer.adapter_layer_names)
        names.never = never
    others = {n: v for n, v in layer.frozen_peft_weight_names.items() if n != adapter}
    layer.frozen_peft_weight_names = others | ({adapter: names} if names else {})


def _never(layer: LoraLayer, adapter: str) -> tuple[str, ...]:
    names = layer.frozen_peft_weight_names.get(adapter, ())
    return names.never if isinstance(names, _Resting) else tuple(names)


def adapter_parameters(layer: LoraLayer, adapter: str) -> dict[str, nn.Parameter]:
    """The tensors of one adapter in one wrapped module, without those that its variant never trains (MiCA's B)."""
    found: dict[str, nn.Parameter] = {}
    frozen = _never(layer, adapter)
    for group in layer.adapter_layer_names:
        held = getattr(layer, group, {})
        if adapter not in held or group in frozen:
            continue
        item = held[adapter]
        if isinstance(item, nn.Parameter):
            found[group] = item
        elif isinstance(item, nn.Module):
            found |= {f"{group}.{n}": p for n, p in item.named_parameters()}
    return found


def unwrap_layer(model: nn.Module, name: str, adapter: str) -> None:
    """Takes one adapter off one module; the module itself comes back where no other adapter is left."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LoraLayer)
    if set(layer.r) == {adapter}:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
        return
    others = [n for n in layer.active_adapters if n != adapter]
    kept = [p for n in layer.r if n != adapter for p in adapter_parameters(layer, n).values()]
    flags = [(p, p.requires_grad) for p in kept]
    layer.delete_adapter(adapter)
    # PEFT activates another adapter in the place of the one that goes; what was inactive stays so
    layer._active_adapter = others
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


# ---- PEFT's wrapper of a parameter, and what has no values; `tests/integrations/test_canary_experts.py` fails first


def stores_out_first(layer: Any) -> bool:
    """Whether a wrapped weight of experts is stored (experts, out, in), as PEFT sees it; otherwise (experts, in, out)."""
    return layer._did_swap_in_out_features


def is_traced(t: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no values (`plan`)."""
    return t.device.type == "meta" or type(t).__name__ == "FakeTensor"


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, every adapter of the model is switched off, as by `disable_adapter()`; what requires a gradient may change."""
    wrapped = [
        m
        for m in model.modules()
        if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) and not m.disable_adapters
    ]
    try:
        for module in wrapped:
            module.enable_adapters(False)
        yield
    finally:
        for module in wrapped:
            module.enable_adapters(True)
