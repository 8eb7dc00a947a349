"""Checkpoints of a Trainer run: the newest complete one, and what keeps the others from being resumed."""

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from layerpeft.errors import SaveError
from layerpeft.integrations.files import header_of, read_json, read_pickled
from layerpeft.saving.manifest import ADAPTER_FILES, CONFIG, MANIFEST, PICTURES, WEIGHTS, read_manifest

_STATE: dict[str, type] = {"global_step": int, "log_history": list, "stateful_callbacks": dict}
logger = logging.getLogger(__name__)


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
        troubles = checkpoint_troubles(found[step], strict)
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


def checkpoint_troubles(checkpoint: Path, strict: bool = False) -> list[str]:
    """Everything that keeps a checkpoint from being resumed; `strict`: a manifest is demanded."""
    try:
        return _troubles(checkpoint, strict)
    except OSError as error:
        return [f"{error.filename or checkpoint} cannot be read: {error.strerror}"]


def _troubles(checkpoint: Path, strict: bool) -> list[str]:
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
        try:
            header_of(path)
        except (OSError, ValueError) as error:
            troubles.append(f"{path.relative_to(checkpoint)} is truncated, or no file of tensors: {error}")
    if not adapters and not list(checkpoint.glob("*.safetensors")) and not list(checkpoint.glob("pytorch_model*")):
        troubles.append("the weights are missing")
    troubles += _state_troubles(checkpoint)
    return troubles


def _state_troubles(checkpoint: Path) -> list[str]:
    """What is wrong with the trainer's own files."""
    troubles = []
    state = checkpoint / "trainer_state.json"
    try:
        troubles += [f"trainer_state.json: {sentence}" for sentence in _not_a_state(read_json(state, finite=False))]
    except SaveError as error:
        troubles.append(
            f"trainer_state.json cannot be read: {error}" if state.exists() else "trainer_state.json is missing"
        )
    # DeepSpeed and FSDP keep the optimizer in folders and files of their own, and DeepSpeed the scheduler with it
    sharded = any(checkpoint.glob("global_step*")) or any(checkpoint.glob("optimizer_*"))
    if not sharded and not any((checkpoint / name).is_file() for name in ("optimizer.pt", "optimizer.bin")):
        troubles.append("optimizer.pt is missing (was save_only_model on?)")
    if not any(checkpoint.glob("global_step*")) and not (checkpoint / "scheduler.pt").is_file():
        troubles.append("scheduler.pt is missing")
    for path in sorted(checkpoint.iterdir()):
        known = path.name in ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
        if known or re.fullmatch(r"rng_state(_\d+)?\.pth", path.name):
            troubles += [f"{path.name} cannot be read: {sentence}" for sentence in _not_whole(path)]
    return troubles


def _not_a_state(found: Mapping[str, Any]) -> list[str]:
    """What of trainer_state.json Trainer would stumble over."""
    strange = sorted(set(found) - {f.name for f in fields(TrainerState)})
    wrong = [k for k, kind in _STATE.items() if not isinstance(found.get(k, kind()), kind)]
    return [f"{k} is not known to this version of transformers" for k in strange] + [f"{k} is damaged" for k in wrong]


def _not_whole(path: Path) -> list[str]:
    """What is wrong with a torch.save file: its checksums and its form, of which no object is made that could run code."""
    if not _zip_whole(path):
        return ["truncated or altered"]
    try:
        return [] if isinstance(read_pickled(path), Mapping) else ["it holds something else"]
    except ValueError as error:
        return [str(error)]


def _zip_whole(path: Path) -> bool:
    """Whether a torch.save file is whole, told from its zip checksums: nothing in it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch writes no checksums when a program turned them off; the directory at the end still shows truncation
            return not torch.serialization.get_crc32_options() or archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
