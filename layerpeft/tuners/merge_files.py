"""Merging an adapter into a checkpoint on disk, module by module: one file of weights and one module are in memory at a time."""

import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from layerpeft.errors import LayerpeftError, SaveError
from layerpeft.integrations.files import as_written
from layerpeft.integrations.merging import bare, converts, merged_alone, tied, write_config
from layerpeft.integrations.peft import BASE_BIAS
from layerpeft.integrations.torch import give_back
from layerpeft.model.biases import biased, no_bias, with_biases
from layerpeft.model.layers import find_module, layer_map
from layerpeft.model.names import adapted, upwards
from layerpeft.saving.shards import INDEX, Checkpoint, entries_of, open_checkpoint
from layerpeft.training.method import Fold
from layerpeft.training.record import HEAD
from layerpeft.tuners.layer_weights import LayerWeights, WeightOf, weighed

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names
ARCHITECTURE = ("num_labels", "id2label", "label2id", *HEAD)  # what may be asked of `from_pretrained` besides a type


@dataclass(frozen=True)
class Plan:
    """What goes where: `inside`: module -> the adapter's tensors in it; `instead`: tensor of the model -> the adapter's own.
    `added`: biases of the model that the base does not have; `fold`: what merges a module in the place of PEFT; `weight_of`: by
    which what was trained in a tensor counts."""

    model: Any
    base: Checkpoint
    adapter: Checkpoint
    config: Any
    inside: Mapping[str, list[str]]
    instead: Mapping[str, str]
    added: frozenset[str] = frozenset()
    fold: Fold | None = None
    weight_of: WeightOf = lambda _: 1.0


class NotPiecewise(LayerpeftError):
    """The reason why this adapter cannot be merged module by module."""


def plan_merge(
    folder: Path,
    base: Path,
    kind: str | None,
    dtype: torch.dtype | None,
    given: Mapping[str, Any],
    fold: Fold | None = None,
    weights: LayerWeights | None = None,
    stack: str | None = None,
) -> Plan:
    """Raises: NotPiecewise; SaveError for a damaged base, or one that has no place for biases of the adapter; ConfigError for
    weights of layers that are not there."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA" or config.layer_replication or config.trainable_token_indices:
        raise NotPiecewise("the adapter is more than LoRA in single modules")
    if not (folder / ADAPTER).is_file():
        raise NotPiecewise("the adapter is not in safetensors")
    held = open_checkpoint(base)
    if held is None:
        raise NotPiecewise("the base is not in safetensors")
    strange = set(given) - set(ARCHITECTURE)
    if strange:
        raise NotPiecewise(f"{', '.join(sorted(strange))} may change what is loaded")
    shape: Any = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, **given)
    if hasattr(shape, "auto_map"):
        raise NotPiecewise("the base has code of its own")
    kept: Any = dtype or shape.dtype or held.dtype or torch.float32
    kept = getattr(torch, kept) if isinstance(kept, str) else kept
    model = bare(_class(config, kind), shape, kept)
    if converts(model, kept):
        raise NotPiecewise("transformers converts the tensors of such a checkpoint")
    adapter = _adapter(folder)
    inside, instead = _sorted(model, adapter)
    keys, added = _added(model, adapter)
    if keys:
        model = bare(_class(config, kind), with_biases(shape, keys), kept)
    _check(model, held, adapter, inside, instead, added)
    weight_of = weights.placed(layer_map(model, stack).names) if weights is not None else Plan.weight_of
    return Plan(model, held, adapter, config, inside, instead, added, fold, weight_of)


def write_merged(plan: Plan, into: Path) -> None:
    """The files of the base with the adapter in them, under the same names, and the configs. Raises: SaveError."""
    names = set(plan.model.state_dict())
    new = [n for n in (*plan.instead, *sorted(plan.added)) if n not in plan.base.entries]
    types = {n: t.dtype for n, t in plan.model.state_dict().items()}
    ready: dict[str, torch.Tensor] = {}  # of a module that was merged, until their file is written
    where: dict[str, str] = {}
    total = 0
    for i, (file, held) in enumerate(plan.base.files.items()):
        tensors: dict[str, torch.Tensor] = {}
        wanted = [n for n in held if n in names] + (new if i == len(plan.base.files) - 1 else [])
        title = f"merging {i + 1}/{len(plan.base.files)}"
        for name in tqdm(wanted, desc=title, unit="tensor", leave=False, disable=None):
            tensors[name] = _tensor(plan, name, types, ready).contiguous()
            total += tensors[name].nbytes
            where[name] = file
        if tensors:
            save_file(tensors, into / file, {"format": "pt"})
        del tensors
        give_back()
    if len(plan.base.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (into / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_config(plan.model, str(plan.base.folder), into)


def _tensor(plan: Plan, name: str, types: Mapping[str, torch.dtype], ready: dict[str, torch.Tensor]) -> torch.Tensor:
    """One tensor of the merged model, in the type it is loaded in."""
    if name in ready:
        return ready.pop(name)
    weight = plan.weight_of(name)
    if name in plan.instead:
        own = plan.adapter.read(plan.instead[name])
        return own.to(types[name]) if weight == 1 else weighed(_of_base(plan, name, types[name]), own, weight)
    module = next((m for m in upwards(name)[1:] if m in plan.inside), None)
    if module is None:
        return _of_base(plan, name, types[name])
    empty = plan.model.get_submodule(module)
    state = {n: _of_base(plan, f"{module}.{n}", types[f"{module}.{n}"]) for n in empty.state_dict()}
    old = state
    if weight != 1:  # then the change is computed before anything is rounded
        state = {n: t.double() if t.is_floating_point() else t for n, t in old.items()}
    with as_written(f"{module} cannot be merged"):
        if plan.fold is not None:
            merged = plan.fold(module, empty, state)
        else:
            adapter = {n: plan.adapter.read(n) for n in plan.inside[module]}
            merged = merged_alone(plan.model, module, state, plan.config, adapter)
    if weight != 1:
        merged = {n: weighed(t, merged[n], weight) for n, t in old.items()}
    ready |= {f"{module}.{n}": t for n, t in merged.items()}
    give_back()
    return ready.pop(name)


def _of_base(plan: Plan, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the base, in the type it is loaded in. Raises: SaveError for one that only the adapter has."""
    if name in plan.added:
        return torch.zeros(plan.model.get_parameter(name).shape, dtype=dtype)
    if name not in plan.base.entries:
        raise SaveError(f"{name} is new with the adapter: it has no base that a weight other than 1 could begin from")
    return plan.base.read(name).to(dtype)


def _class(config: Any, kind: str | None) -> Any:
    if kind is not None:
        return getattr(transformers, kind)
    auto = config.auto_mapping or {}
    if str(auto.get("parent_library", "")).partition(".")[0] != "transformers":
        raise NotPiecewise("the class of the base is not one of transformers")
    try:
        return getattr(importlib.import_module(auto["parent_library"]), auto["base_model_class"])
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise NotPiecewise(
            f"there is no class {auto.get('base_model_class')!r} in {auto['parent_library']!r}"
        ) from error


def _adapter(folder: Path) -> Checkpoint:
    """The adapter's tensors, as a checkpoint of one file."""
    return Checkpoint(folder, entries_of(folder / ADAPTER))


def _sorted(model: nn.Module, adapter: Checkpoint) -> tuple[dict[str, list[str]], dict[str, str]]:
    modules = {n for n, _ in model.named_modules()}
    names = set(model.state_dict())
    inside: dict[str, list[str]] = {}
    plain: dict[str, str] = {}
    for key in adapter.entries:
        name = key.removeprefix(PREFIX)
        if adapted(name) != name:
            raise NotPiecewise(f"{key} has the name of a model that was compiled or divided")
        if name in names:
            plain[name] = key
            continue
        module = next((m for m in upwards(name)[1:] if m in modules), None)
        if module is None or not key.startswith(PREFIX):
            raise NotPiecewise(f"{key} belongs to no module of the base")
        inside.setdefault(module, []).append(key)
    instead: dict[str, str] = {}
    for name, key in plain.items():  # the bias of a module with LoRA is PEFT's to put in
        module = next((m for m in upwards(name)[1:] if m in inside), None)
        if module is None:
            instead[name] = key
        else:
            inside[module].append(key)
    return inside, instead


def _added(model: Any, adapter: Checkpoint) -> tuple[tuple[str, ...], frozenset[str]]:
    """The keys of a config by which the base gets the biases that the adapter adds to, and those biases.

    Raises: SaveError where it can have none.
    """
    bare_ones = without_bias(model, adapter.entries)
    if not bare_ones:
        return (), frozenset()
    found = biased(model, bare_ones)
    if found is None:
        raise SaveError(no_bias(model, bare_ones))
    return found[0], frozenset(f"{n}.bias" for n in found[1])


def without_bias(model: Any, keys: Iterable[str]) -> list[str]:
    """The linears without a bias that an adapter of these tensors holds one of."""
    ends = (".lora_B.bias", BASE_BIAS)
    names = [k.removeprefix(PREFIX).removesuffix(end) for k in keys for end in ends if k.endswith(end)]
    return [n for n in names if getattr(find_module(model, n), "bias", None) is None]


def _check(
    model: Any,
    weights: Checkpoint,
    adapter: Checkpoint,
    inside: Mapping[str, Any],
    instead: Mapping[str, str],
    added: frozenset[str],
) -> None:
    """Raises: NotPiecewise where tensors are missing, shared, of other shapes, or computed by the model."""
    state = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    same = tied(model)
    missing = [n for n in state if n not in {*weights.entries, *instead, *same, *added}]
    if missing:
        raise NotPiecewise(f"the base lacks {len(missing)} of the model's names, such as {missing[0]}")
    changed = {f"{m}.{n}" for m in inside for n in model.get_submodule(m).state_dict()} | set(instead)
    shared = sorted(changed & (set(same) | set(same.values())))
    if shared:
        raise NotPiecewise(f"{shared[0]} is shared between modules")
    found = {n: e.shape for n, e in weights.entries.items()} | {n: adapter.entries[k].shape for n, k in instead.items()}
    other = [n for n in state if n in found and n not in added and found[n] != state[n]]
    if other:
        raise NotPiecewise(f"{other[0]} has another shape in the base")
    for module in inside:
        buffers = {n for n, _ in model.get_submodule(module).named_buffers()}
        if buffers - set(model.get_submodule(module).state_dict()):
            raise NotPiecewise(f"{module} computes tensors by itself")
