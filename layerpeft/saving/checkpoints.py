"""Checkpoints of a Trainer run: the newest complete one, and what keeps the others from being resumed."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path

import torch

from layerpeft.errors import SaveError
from layerpeft.integrations.files import header_of
from layerpeft.saving.manifest import ADAPTER_FILES, CONFIG, MANIFEST, PICTURES, WEIGHTS, read_manifest

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
        try:
            header_of(path)
        except ValueError:
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
