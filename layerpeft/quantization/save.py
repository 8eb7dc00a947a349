"""A quantized model as a folder: in transformers' own layout where that can hold it, else in one that only layerpeft reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from layerpeft.errors import Problems, SaveError
from layerpeft.integrations.bitsandbytes import is_repacked, keep_cpu_layout, saving, standard
from layerpeft.integrations.files import (
    as_written,
    digest_of,
    fingerprint,
    must_be_new,
    read_json,
    replacing,
    tensors_trouble,
    versions_of,
    written_whole,
)
from layerpeft.integrations.filling import METHOD, PREFIX, Packed, quiet_bars, stored_settings
from layerpeft.integrations.peft import BaseTunerLayer, PeftModel
from layerpeft.model.layers import base_of
from layerpeft.model.precisions import KEPT, PRECISIONS, joined, missing_packages, parts, precision_of
from layerpeft.quantization.apply import MARKS, mark_kinds
from layerpeft.selection.typecheck import read_fields

FORMAT = 1
MANIFEST = "layerpeft_quant.json"
# how weight files begin: under the second name nothing but layerpeft finds them
THEIRS, OURS = "model", "layerpeft_model"
_PACKAGES = ("layerpeft", "transformers", "torch", "bitsandbytes", "hqq")


@dataclass(frozen=True)
class Written:
    """What the manifest holds."""

    format: int
    plain_transformers: bool
    weights: str
    modules: dict[str, str]
    packed: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]


def save_model(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: str | int = "5GB") -> Path:
    """Writes a model whose linears are quantized, for `layerpeft.load`: config, weights in shards, and layerpeft_quant.json, last.

    With one kind of bitsandbytes' layers beside kept ones it is a checkpoint of transformers, which `from_pretrained` reads
    without layerpeft; any other mixture plain transformers refuses. The folder must be new or empty, and is there whole or not
    at all. Raises: SaveError for a model with adapters, or without quantized linears, or for a folder that holds something.
    """
    target = Path(folder)
    found: Any = base_of(model)
    precisions = _check(model, found, target)
    settings = standard(found, precisions)
    with written_whole(target) as partial_folder:
        packed = _write(found, partial_folder, precisions, settings, max_shard_size)
        _write_manifest(found, partial_folder, precisions, packed)
    return target


def is_saved(folder: str | os.PathLike[str]) -> bool:
    """Whether `save_model` wrote this folder."""
    return (Path(folder) / MANIFEST).is_file()


def load_saved(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | int | None = None,
    verify: bool = True,
    progress: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """The model that `save_model` wrote, tensor for tensor; `verify`: every file is hashed first, not only measured.
    `kwargs` go to `from_pretrained`. Raises: SaveError for a folder that is not whole, or a package that is missing."""
    folder = Path(folder)
    manifest = read_manifest(folder, verify)
    missing = missing_packages(manifest["modules"].values())
    if missing:
        raise SaveError(f"{folder} needs packages that are not installed: pip install {' '.join(missing)}")
    kind = getattr(transformers, str(manifest.get("class")), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise SaveError(f"{folder} holds a {manifest.get('class')}, which this version of transformers does not know")
    options: dict[str, Any] = {"dtype": "auto", **kwargs}
    if device is not None:
        options["device_map"] = {"": device}
    if manifest["packed"]:
        config = transformers.AutoConfig.from_pretrained(folder)
        config.quantization_config = stored_settings(_packed(manifest))  # type: ignore[attr-defined]
        config.transformers_weights = manifest["weights"]  # type: ignore[attr-defined]
        options["config"] = config
    with quiet_bars(not progress), as_written(f"{folder} cannot be loaded"):
        model: Any = kind.from_pretrained(folder, **options)
    vars(model.config).pop("transformers_weights", None)
    keep_cpu_layout(model)
    for name in MARKS.values():
        vars(model).pop(name, None)  # of transformers' own loader, which keeps them for good
    mark_kinds(model, manifest["modules"].values())
    return model


def read_manifest(folder: str | os.PathLike[str], verify: bool = True) -> dict[str, Any]:
    """What layerpeft_quant.json says. Raises: SaveError naming every file that is missing, truncated or altered."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise SaveError(f"{folder} has no {MANIFEST}: save_model did not write it, or was cut short")
    manifest = read_json(path)
    if manifest.get("sha256") != digest_of(manifest):
        raise SaveError(f"{path} was altered after it was written")
    missing = [f.name for f in fields(Written) if f.name not in read_fields(Written, manifest, SaveError, path)]
    if missing:
        raise SaveError(f"{path} lacks {', '.join(missing)}")
    if manifest["format"] > FORMAT:
        raise SaveError(
            f"{path} has format {manifest['format']} and this version of layerpeft reads up to {FORMAT}: it was written by a "
            "newer one (pip install --upgrade layerpeft)"
        )
    problems = Problems(f"{folder} is not the model that was saved")
    for name, expected in manifest["files"].items():
        file = folder / name
        if name != os.path.basename(name) or not file.is_file():
            problems.add(f"{name} is missing")
        elif file.stat().st_size != expected.get("size"):
            problems.add(f"{name} is {file.stat().st_size:,} bytes of {expected.get('size')}")
        elif verify and fingerprint(file)["sha256"] != expected.get("sha256"):
            problems.add(f"{name} was altered (SHA-256 differs)")
        elif trouble := tensors_trouble(file) if name.endswith(".safetensors") else None:
            problems.add(trouble)
    problems.raise_if_any(SaveError)
    return manifest


# ---- writing --------------------------------------------------------------------------------------------------------


def _check(model: nn.Module, found: Any, target: Path) -> dict[str, str]:
    """Precision by name of the quantized linears. Raises: SaveError."""
    problems = Problems(f"the model cannot be saved to {target}")
    if why := must_be_new(target):
        problems.add(why)
    if not isinstance(found, transformers.PreTrainedModel):
        problems.add(f"{type(found).__name__} is no model of transformers")
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in found.modules()):
        problems.add(
            "it has adapters: save those with model.save_pretrained(folder), and the base without them, "
            "save_model(model.unload(), folder)"
        )
    names = {n: precision_of(m) for n, m in found.named_modules() if not isinstance(m, BaseTunerLayer)}
    precisions = {n: p for n, p in names.items() if p != KEPT}
    if not precisions:
        problems.add("it has no quantized linears; model.save_pretrained(folder) writes it")
    if any(t.is_meta for t in found.parameters()):
        problems.add("parts of it are not in memory (offloaded)")
    if any(is_repacked(found.get_submodule(n)) for n in precisions):
        problems.add(
            "an evaluation forward has repacked its 4-bit weights for this CPU, which bitsandbytes cannot undo exactly; load it "
            "again, through layerpeft or with support_avx512bf16_for_cpu=False on each of its 4-bit layers"
        )
    problems.raise_if_any(SaveError)
    return precisions


def _write(model: Any, folder: Path, precisions: Mapping[str, str], settings: Any, size: str | int) -> dict[str, Any]:
    """Config and weights; returns what the manifest has to say of packed linears, nothing for transformers' own layout."""
    packed: dict[str, Any] = {}
    state: dict[str, torch.Tensor] | None = None
    if settings is None:
        state, packed = _taken_apart(model, precisions)
    with saving(model, settings if settings is not None else {"quant_method": METHOD}):
        model.save_pretrained(folder, state_dict=state, max_shard_size=size)
    if settings is None:
        _rename(folder)
    return packed


def _taken_apart(model: Any, precisions: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of a model with the tensors of each quantized linear under names of their own, and the facts about them."""
    above = tuple(f"{n}." for n in precisions)
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith(above)}
    packed: dict[str, Any] = {}
    for name in precisions:
        module = model.get_submodule(name)
        tensors, facts = parts(module, precisions[name])
        if module.bias is not None:
            state[f"{name}.bias"] = module.bias
        state |= {f"{name}.{PREFIX}{key}": tensor for key, tensor in tensors.items()}
        shapes = {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors.items()}
        packed[name] = {"tensors": shapes, "facts": facts}
    return {n: t.detach() for n, t in state.items()}, packed


def _rename(folder: Path) -> None:
    """Gives the weights names under which transformers does not look, so that it stops instead of drawing them at random."""
    for file in sorted(folder.glob(f"{THEIRS}*.safetensors*")):
        new = file.with_name(file.name.replace(THEIRS, OURS, 1))
        if file.name.endswith(".json"):
            index = json.loads(file.read_text(encoding="utf-8"))
            index["weight_map"] = {n: f.replace(THEIRS, OURS, 1) for n, f in index["weight_map"].items()}
            file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        file.rename(new)


def _write_manifest(model: Any, folder: Path, precisions: Mapping[str, str], packed: Mapping[str, Any]) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    index = [p.name for p in files if p.name.endswith(".safetensors.index.json")]
    weights = index or [p.name for p in files if p.name.endswith(".safetensors")]
    record: dict[str, Any] = {
        "format": FORMAT,
        "class": type(model).__name__,
        "plain_transformers": not packed,
        "weights": weights[0],
        "modules": dict(precisions),
        "packed": dict(packed),
        "versions": versions_of(_PACKAGES),
        "files": {p.name: fingerprint(p) for p in files},
    }
    record = json.loads(json.dumps(record, allow_nan=False))
    record["sha256"] = digest_of(record)
    with replacing(folder / MANIFEST, newer_than=0) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _packed(manifest: Mapping[str, Any]) -> dict[str, Packed]:
    problems = Problems(f"{MANIFEST} cannot be used")
    found = {}
    for name, record in manifest["packed"].items():
        precision = manifest["modules"].get(name)
        if precision not in PRECISIONS:
            problems.add(f"{name} has the precision {precision!r}, which this version does not know")
            continue
        with as_written(f"{MANIFEST} is not what was written"):
            join = partial(joined, precision=precision, facts=record["facts"])
            found[name] = Packed({k: (dtype, shape) for k, (dtype, shape) in record["tensors"].items()}, join)
    problems.raise_if_any(SaveError)
    return found
