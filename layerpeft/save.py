"""The side file `layerpeft.json`: written last, it vouches for every other file of an adapter; and loading with it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import secrets
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from layerpeft.errors import Problems, SaveError
from layerpeft.selection import LiveRecord, Selection

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "layerpeft.json"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PICTURES = ("layers.csv", "layers.png")
STATES = tuple(f"layerpeft_{name}.safetensors" for name in ("state", "optimizer", "masters"))
BITS = "bits.png"
ADAPTER_FILES = (CONFIG, *WEIGHTS, *STATES, *PICTURES, BITS)

_RESERVED = ("format", "versions", "files", "sha256")
_PACKAGES = ("layerpeft", "peft", "transformers", "torch")
_AUTO_MODELS = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
}


def has_weights(folder: str | os.PathLike[str]) -> bool:
    """Whether this save has already put the adapter's weights there: present, and no older than the last manifest.

    PEFT writes the weights before the config, transformers' own `save_pretrained` after it. In a folder that is saved
    into again, weights that an existing manifest is newer than come from the save before.
    """
    folder = Path(folder)
    present = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not present:
        return False
    manifest = folder / MANIFEST
    newest = max(path.stat().st_mtime_ns for path in present)
    return not manifest.is_file() or newest >= manifest.stat().st_mtime_ns


def write_manifest(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write layerpeft.json, last and whole: record + format, versions, size and SHA-256 of the adapter's files.

    `record` holds method, selection, config and report; more keys are kept as they are. Raises: SaveError when the
    record is not plain data or the folder holds no complete adapter; an older manifest then stays untouched.
    """
    folder = Path(folder)
    problems = Problems(f"cannot write {folder / MANIFEST}")
    for key in _RESERVED:
        if key in record:
            problems.add(f"the record may not hold {key!r}: it is filled in here")
    for key in ("method", "selection", "config", "report"):
        if key not in record:
            problems.add(f"the record lacks {key!r}")
    if not (folder / CONFIG).is_file():
        problems.add(f"{CONFIG} is missing")
    if not any((folder / name).is_file() for name in WEIGHTS):
        problems.add(f"the weights are missing ({' or '.join(WEIGHTS)})")
    problems.raise_if_any(SaveError)
    present = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    payload = {
        "format": FORMAT,
        **record,
        "versions": {name: _version(name) for name in _PACKAGES},
        "files": {name: _fingerprint(folder / name, durable=True) for name in present},
    }
    try:
        plain = json.loads(json.dumps(payload, default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SaveError(f"cannot write {folder / MANIFEST}: {error}") from error
    plain["sha256"] = _digest(plain)
    newest = max((folder / name).stat().st_mtime_ns for name in present)
    _replace(folder / MANIFEST, json.dumps(plain, indent=2, allow_nan=False) + "\n", newest)


def _plain(value: Any) -> Any:
    """Sets, enums and paths as plain data. Raises: TypeError for everything else."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) is not plain data")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _fingerprint(path: Path, durable: bool = False) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, streamed; `durable` first has it put on the disk."""
    with path.open("rb") as file:
        if durable:  # the manifest must never outlive what it vouches for; not every system syncs a file opened to read
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's own content, without the field that holds it; spacing and key order do not count."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _replace(path: Path, text: str, newer_than: int) -> None:
    """Write beside the file, force it to disk, swap it in. The time stamp ends up after `newer_than` (nanoseconds)."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed here
        left.unlink(missing_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if beside.stat().st_mtime_ns <= newer_than:  # coarse clocks: has_weights() compares the two
            os.utime(beside, ns=(newer_than + 1_000_000, newer_than + 1_000_000))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- verifying ------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a complete folder. Raises: SaveError naming every file that is missing, truncated or altered."""
    folder = Path(folder)
    manifest = _parse_manifest(folder)
    problems = Problems(f"{folder} is not the adapter that was saved")
    if manifest.get("sha256") != _digest(manifest):
        problems.add(f"{MANIFEST} was altered after it was written")
    files = manifest.get("files")
    files = files if isinstance(files, dict) else {}
    if CONFIG not in files or not any(name in files for name in WEIGHTS):
        problems.add(f"{MANIFEST} does not list {CONFIG} and the weights")
    for name, expected in files.items():
        trouble = _file_trouble(folder, name, expected)
        if trouble:
            problems.add(trouble)
    for name in (CONFIG, *WEIGHTS):
        if name not in files and (folder / name).exists():
            problems.add(f"{name} is there but {MANIFEST} does not list it: it was added later")
    problems.raise_if_any(SaveError)
    return manifest


def selection_of(folder: str | os.PathLike[str]) -> Selection:
    """The choice of layers that a saved folder records. Raises: SaveError when it is damaged or holds none."""
    selection = read_manifest(folder)["selection"]
    if selection is None:
        raise SaveError(f"{folder} was saved before its layers were chosen, so it records no choice")
    return Selection.from_dict(selection)


def _parse_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it stands, after its format is checked."""
    if not folder.is_dir():
        raise SaveError(f"{folder} is not a folder")
    path = folder / MANIFEST
    if not path.is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{MANIFEST}"))
        if inside and not (folder / CONFIG).exists():
            raise SaveError(f"{folder} holds adapters in folders of their own; name one of them: {', '.join(inside)}")
        raise SaveError(
            f"{folder} has no {MANIFEST}: it was not saved by layerpeft, or saving was cut short. To load it all the "
            f"same, unchecked and without the record: peft.PeftModel.from_pretrained(model, {str(folder)!r})"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON, bad UTF-8
        raise SaveError(f"{path} is truncated or altered: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise SaveError(f"{path} is truncated or altered: it does not say its format")
    if found > FORMAT:
        raise SaveError(
            f"{path} has format {found} and this version of layerpeft reads up to {FORMAT}: it was written by a newer "
            "one (pip install --upgrade layerpeft)"
        )
    return manifest


def _file_trouble(folder: Path, name: str, expected: Any) -> str | None:
    """What is wrong with one listed file, or None."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        return f"{MANIFEST} lists {name!r}, which is not a file of this folder"
    path = folder / name
    if not isinstance(expected, dict) or not isinstance(expected.get("size"), int):
        return f"{MANIFEST} does not say the size of {name}"
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size < expected["size"]:
        return f"{name} is truncated: {size:,} bytes of {expected['size']:,}"
    if size != expected["size"] or _fingerprint(path) != expected:
        return f"{name} was altered (size or SHA-256 differs)"
    return None


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint-N of a Trainer run, or None; every newer one is logged with what it lacks."""
    root = Path(output_dir)
    found: dict[int, Path] = {}
    for path in root.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and path.is_dir():
            found[int(number[1])] = path
    # select="all" is plain LoRA and writes no manifest: one is demanded as soon as anything shows that this run does
    strict = any(_has_traces(folder) for path in found.values() for folder in _adapter_folders(path))
    for step in sorted(found, reverse=True):
        troubles = _checkpoint_troubles(found[step], strict)
        if not troubles:
            return str(found[step])
        logger.warning("%s is passed over, it is not complete: %s", found[step], "; ".join(troubles))
    return None


def _adapter_folders(checkpoint: Path) -> list[Path]:
    """Where a checkpoint keeps adapters: itself for "default", a folder of its own for every other name."""
    folders = [checkpoint, *sorted(path for path in checkpoint.iterdir() if path.is_dir())]
    return [folder for folder in folders if any((folder / name).exists() for name in (*ADAPTER_FILES, MANIFEST))]


def _has_traces(folder: Path) -> bool:
    """Whether layerpeft has written, or begun to write, its own files there."""
    return any((folder / name).exists() for name in (MANIFEST, *PICTURES)) or any(folder.glob(f".{MANIFEST}.*.tmp"))


def _checkpoint_troubles(checkpoint: Path, strict: bool) -> list[str]:
    """Everything that keeps a checkpoint from being resumed."""
    troubles = []
    adapters = _adapter_folders(checkpoint)
    for folder in adapters:
        if strict or (folder / MANIFEST).exists():
            try:
                read_manifest(folder)
            except SaveError as error:
                troubles.append(str(error))
        elif not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in WEIGHTS):
            troubles.append(f"{folder.name} lacks {CONFIG} or the weights")
    for path in sorted(checkpoint.rglob("*.safetensors")):
        if not _safetensors_whole(path):
            troubles.append(f"{path.relative_to(checkpoint)} is truncated")
    if not adapters and not list(checkpoint.glob("*.safetensors")) and not list(checkpoint.glob("pytorch_model*")):
        troubles.append("the weights are missing")
    troubles += _state_troubles(checkpoint)
    return troubles


def _state_troubles(checkpoint: Path) -> list[str]:
    """What is wrong with the trainer's own files."""
    troubles = []
    state = checkpoint / "trainer_state.json"
    try:
        if not isinstance(json.loads(state.read_text(encoding="utf-8")), dict):
            troubles.append("trainer_state.json does not hold a state")
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        troubles.append(f"trainer_state.json {'is missing' if missing else 'cannot be read'}")
    # DeepSpeed and FSDP keep the optimizer in folders and files of their own, and DeepSpeed the scheduler with it
    sharded = any(checkpoint.glob("global_step*")) or any(checkpoint.glob("optimizer_*"))
    if not sharded and not any((checkpoint / name).is_file() for name in ("optimizer.pt", "optimizer.bin")):
        troubles.append("optimizer.pt is missing (was save_only_model on?)")
    if not any(checkpoint.glob("global_step*")) and not (checkpoint / "scheduler.pt").is_file():
        troubles.append("scheduler.pt is missing")
    for path in sorted(checkpoint.iterdir()):
        known = path.name in ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
        if (known or re.fullmatch(r"rng_state(_\d+)?\.pth", path.name)) and not _zip_whole(path):
            troubles.append(f"{path.name} cannot be read: truncated or altered")
    return troubles


def _zip_whole(path: Path) -> bool:
    """Whether a torch.save file is whole, told from its zip checksums: nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch writes no checksums when a program turned them off; the directory at the end still shows truncation
            return not torch.serialization.get_crc32_options() or archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _safetensors_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def load_verified(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, is_trainable: bool = False, **kwargs: Any
) -> peft.PeftModel:
    """A saved adapter on its base model, verified before any weight is read, with the record for `layer_report`.

    Without `model` the base is built from what adapter_config.json names; `kwargs` go to PEFT's (and, then,
    transformers') `from_pretrained`. Raises: SaveError for a damaged folder, or a base that is not to be had or does
    not fit.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    kwargs["is_trainable"] = is_trainable
    if model is None:
        loaded = _load_with_base(folder, kwargs)
    else:
        _check_base(folder, model, manifest)
        loaded = peft.PeftModel.from_pretrained(model, str(folder), **kwargs)
    config = loaded.peft_config[kwargs.get("adapter_name", "default")]
    config._layerpeft = _live_record(manifest)  # type: ignore[attr-defined]
    return loaded


def _load_with_base(folder: Path, kwargs: dict[str, Any]) -> peft.PeftModel:
    """Build the base model by the task type or class that adapter_config.json names, and put the adapter on it."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    task, base = config.get("task_type"), config.get("base_model_name_or_path")
    cure = f"pass the base model: load({str(folder)!r}, model)"
    if not base:
        raise SaveError(f"{folder / CONFIG} does not name a base model (base_model_name_or_path is empty); {cure}")
    if not task and not config.get("auto_mapping"):
        raise SaveError(f"{folder / CONFIG} says neither task_type nor the class of the base model {base!r}; {cure}")
    if task and task not in _AUTO_MODELS:
        raise SaveError(f"{folder / CONFIG} has a task_type, {task!r}, without a model class; {cure}")
    auto = _AUTO_MODELS[task] if task else peft.AutoPeftModel
    try:
        return auto.from_pretrained(str(folder.absolute()), **kwargs)  # a relative one could pass for a hub name
    except (OSError, ValueError) as error:  # not found, no such class, a class from a package that peft will not import
        raise SaveError(f"the base model {base!r} of {folder} cannot be loaded: {error}\nThen {cure}") from error


def _check_base(folder: Path, model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Raises: SaveError when `model` is wrapped already, or lacks chosen targets: PEFT would say nothing."""
    if isinstance(model, peft.PeftModel):
        raise SaveError("load() takes the base model, not a PeftModel; model.load_adapter(folder, name) adds to that")
    selection = manifest.get("selection") or {}
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    lost = [name for name in selection.get("targets", ()) if name not in names]
    if lost:
        raise SaveError(
            f"{folder} was trained on another model: {type(model).__name__} lacks {len(lost)} of its "
            f"{len(selection['targets'])} targets, such as {lost[0]!r}"
        )


def _live_record(manifest: Mapping[str, Any]) -> LiveRecord:
    """The record of a saved choice, as it hangs on a live adapter config."""
    selection = manifest["selection"]
    return LiveRecord(
        selection=None if selection is None else Selection.from_dict(selection),
        config=dict(manifest["config"]),
        method=manifest["method"],
        steps_trained={int(row["layer"]): int(row["steps"]) for row in manifest["report"] if row.get("steps")},
        checks=dict(manifest.get("checks") or {}),
        new_tensors=tuple(manifest.get("new_tensors") or ()),
        idle_experts=tuple(manifest.get("idle_experts") or ()),
    )
