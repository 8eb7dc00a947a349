"""Loading a checkpoint with linears that are quantized one by one as they are read, so that it never lies in memory whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from layerpeft.errors import ConfigError, LayerMapError, Problems, unknown
from layerpeft.integrations.bitsandbytes import in_slabs, keep_cpu_layout
from layerpeft.integrations.filling import quiet_bars, settings
from layerpeft.integrations.torch import give_back
from layerpeft.model.layers import layer_map
from layerpeft.model.precisions import KEPT, PRECISIONS, Storage, fits, missing_packages, quantized_linear, stored_bytes
from layerpeft.quantization.apply import mark_kinds
from layerpeft.text import some


def load_quantized(
    name: str | os.PathLike[str],
    assignment: Mapping[str, str],
    storage: Storage,
    *,
    kind: str = "AutoModelForCausalLM",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    revision: str | None = None,
    progress: bool = True,
    before: Callable[[nn.Module], None] | None = None,
    heads: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A model of a folder or of the hub, its linears in the precisions of `assignment` (full name -> precision), others as stored.

    Equal, bit for bit, to `from_pretrained` followed by quantization in place, but each linear is quantized before the next one
    is read: the peak is the result plus one linear. `kind`: class of transformers; `kwargs` go to its `from_pretrained`.
    `before`: as `filling.settings` has it, for a part of a model, all of which must be in the checkpoint, but for `heads`.
    Raises: ConfigError for names that are no linears, a checkpoint that is quantized already, or one that lacks their weights.
    """
    chosen = {n: p for n, p in assignment.items() if p != KEPT}
    _check(chosen, kind, kwargs)
    name = os.fspath(name)
    options = {"dtype": "auto" if dtype is None else dtype, "revision": revision, **kwargs}
    if device is not None:
        options["device_map"] = {"": device}
    if chosen or before is not None:
        _refuse_quantized(name, options)
        options["quantization_config"] = _settings(chosen, storage, before)
    with quiet_bars(not progress):
        model, found = getattr(transformers, kind).from_pretrained(name, output_loading_info=True, **options)
    _check_found(name, model, found, chosen, whole=before is not None and not heads)
    keep_cpu_layout(model)
    mark_kinds(model, chosen.values())
    return model


def _settings(chosen: Mapping[str, str], storage: Storage, before: Callable[[nn.Module], None] | None) -> Any:
    def store(name: str, linear: nn.Linear) -> nn.Module:
        return frugally_quantized(linear, chosen[name], storage)

    def size(name: str, weight: torch.Tensor) -> float:
        out, inner = weight.shape
        return stored_bytes(chosen[name], out, inner, storage, weight.element_size()) / max(weight.numel(), 1)

    def why_not(name: str, linear: nn.Linear) -> str | None:
        out, inner = linear.weight.shape
        if fits(chosen[name], out, inner, storage):
            return None
        return f"{chosen[name]} packs groups of {storage.group_size} weights, which {out} x {inner} do not fill"

    return settings(store, chosen, size, why_not, before)


def frugally_quantized(linear: nn.Linear, precision: str, storage: Storage) -> nn.Module:
    """As `quantized_linear`, with as little memory meanwhile as can be had."""

    def stored(part: nn.Linear, how: Storage = storage) -> nn.Module:
        made = quantized_linear(part, precision, how)
        give_back()
        return made

    if PRECISIONS[precision].package != "bitsandbytes":
        return stored(linear)
    plain = replace(storage, double_quant=False)
    made = in_slabs(linear, lambda part: stored(part, plain), storage.double_quant)
    give_back()
    return made


def _check(chosen: Mapping[str, str], kind: str, kwargs: Mapping[str, Any]) -> None:
    problems = Problems("the model cannot be loaded so")
    for name, precision in chosen.items():
        if precision not in PRECISIONS:
            problems.add(f"{name}: {unknown('precision', precision, PRECISIONS)}")
    missing = missing_packages(p for p in chosen.values() if p in PRECISIONS)
    if missing:
        problems.add(f"these precisions need packages that are not installed: pip install {' '.join(missing)}")
    if not hasattr(transformers, kind):
        problems.add(
            unknown("class of transformers", kind, (n for n in dir(transformers) if n.startswith("AutoModel")))
        )
    if "quantization_config" in kwargs:
        problems.add("quantization_config and a precision by layer exclude each other")
    if "device_map" in kwargs:
        problems.add("device_map: a precision by layer takes one device; write device=…")
    problems.raise_if_any(ConfigError)


def _refuse_quantized(name: str, options: Mapping[str, Any]) -> None:
    where = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code", "code_revision")
    config = transformers.AutoConfig.from_pretrained(name, **{k: v for k, v in options.items() if k in where})
    for part in (config, config.get_text_config(decoder=True)):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
            raise ConfigError(
                f"{name} is quantized already (quant_method {method!r}), and rounding it twice is worse than once: give the "
                "16-bit checkpoint, or load this one with from_pretrained and without a precision by layer"
            )


def _check_found(name: str, model: nn.Module, found: Mapping[str, Any], chosen: Mapping[str, str], whole: bool) -> None:
    """What the checkpoint lacks must be a part of its own, such as a new head, of which transformers has told; nothing where the
    `whole` must be there."""
    lost = sorted(found["missing_keys"])
    stacks = "" if whole or not lost else _stacks(model)
    inside = [n for n in lost if n.startswith(stacks) or n.rpartition(".")[0] in chosen]
    if inside:
        raise ConfigError(
            f"{name} is not a whole checkpoint of {type(model).__name__}: it lacks {len(inside)} tensors of the layers "
            f"({some(inside, 3, ', …')})"
        )


def _stacks(model: nn.Module) -> tuple[str, ...]:
    try:
        stacks = layer_map(model).stacks
    except LayerMapError:
        return ()
    return tuple(f"{stack.rpartition('=')[2]}." for stack in stacks)
