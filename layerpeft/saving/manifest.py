"""The side file `layerpeft.json`: written last, it vouches for every other file of an adapter; and loading with it."""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from layerpeft.errors import Problems, SaveError
from layerpeft.integrations.files import (
    as_written,
    digest_of,
    fingerprint,
    header_of,
    read_json,
    read_pickled,
    replacing,
    tensors_trouble,
    versions_of,
)
from layerpeft.saving.instead import lacking
from layerpeft.selection.select import Selection
from layerpeft.selection.typecheck import read_fields

FORMAT = 1
MANIFEST = "layerpeft.json"
SHORTER = "shorter"  # in the folder of a run: the model that lost layers before
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PICTURES = ("layers.csv", "layers.png")
STATES = tuple(f"layerpeft_{name}.safetensors" for name in ("state", "optimizer", "masters", "heads", "scales"))
BITS = "bits.png"
ADAPTER_FILES = (CONFIG, *WEIGHTS, *STATES, *PICTURES, BITS)

_RESERVED = ("format", "versions", "files", "sha256")
_PACKAGES = ("layerpeft", "peft", "transformers", "torch")


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


def keys_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the adapter's tensors, whose numbers are not read. Raises: SaveError."""
    path = next((p for name in WEIGHTS if (p := Path(folder, name)).is_file()), Path(folder, WEIGHTS[0]))
    with as_written(f"{path} cannot be read"):
        return list(header_of(path) if path.name == WEIGHTS[0] else read_pickled(path))


def write_manifest(folder: str | os.PathLike[str], record: Mapping[str, Any], but: Collection[str] = ()) -> None:
    """Write layerpeft.json, last and whole: record + format, versions, size and SHA-256 of the adapter's files, `but` for some.

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
    present = [name for name in ADAPTER_FILES if name not in but and (folder / name).is_file()]
    payload = {
        "format": FORMAT,
        **record,
        "versions": versions_of(_PACKAGES),
        "files": {name: fingerprint(folder / name, durable=True) for name in present},
    }
    try:
        plain = json.loads(json.dumps(payload, default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SaveError(f"cannot write {folder / MANIFEST}: {error}") from error
    plain["sha256"] = digest_of(plain)
    newest = max((folder / name).stat().st_mtime_ns for name in present)
    with replacing(folder / MANIFEST, newest) as file:
        file.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Sets, enums and paths as plain data. Raises: TypeError for everything else."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) is not plain data")


@dataclass(frozen=True)
class Written:
    """What a manifest holds, as far as anything here reads it."""

    method: str
    selection: dict[str, Any] | None
    config: dict[str, Any]
    report: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    sha256: str
    quant: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    new_tensors: list[str] | None = None
    idle_experts: list[str] | None = None
    checks: dict[str, Any] | None = None
    rows: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    dropped: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    places: list[str] | None = None  # keys of a config by which plain PEFT's base gets biases


# ---- verifying ------------------------------------------------------------------------------------------------------


def check_depth(manifest: Mapping[str, Any], config: Any, base: str) -> None:
    """Raises: SaveError for an adapter of a shortened model whose base, by its config, has another number of layers: their numbers
    mean other layers there."""
    chosen = manifest.get("selection") or {}
    if not manifest.get("dropped") or (chosen.get("unit") or "layer") != "layer":
        return
    there = getattr(config.get_text_config(), "num_hidden_layers", None)
    if there not in (None, chosen.get("num_layers")):
        raise SaveError(
            f"the adapter belongs on a model of {chosen.get('num_layers')} layers, out of which others were taken before it was "
            f"trained, and {base} has {there}: name the shorter model, which lies in the folder `{SHORTER}` of that run"
        )


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a complete folder. Raises: SaveError naming every file that is missing, truncated or altered."""
    folder = Path(folder)
    manifest = _parse_manifest(folder)
    read_fields(Written, manifest, SaveError, folder / MANIFEST)
    problems = Problems(f"{folder} is not the adapter that was saved")
    if manifest.get("sha256") != digest_of(manifest):
        problems.add(f"{MANIFEST} was altered after it was written")
    files = manifest.get("files") or {}
    if CONFIG not in files or not any(name in files for name in WEIGHTS):
        problems.add(f"{MANIFEST} does not list {CONFIG} and the weights")
    for name, expected in files.items():
        try:
            trouble = _file_trouble(folder, name, expected)
        except OSError as error:
            trouble = f"{name} cannot be read: {error.strerror}"
        if trouble:
            problems.add(trouble)
    for name in (CONFIG, *WEIGHTS, *STATES):
        if name not in files and (folder / name).exists():
            problems.add(f"{name} is there but {MANIFEST} does not list it: it was added later")
    problems.raise_if_any(SaveError)
    return manifest


def selection_of(folder: str | os.PathLike[str]) -> Selection:
    """The choice of layers that a saved folder records. Raises: SaveError when it is damaged or holds none."""
    selection = read_manifest(folder).get("selection")
    if selection is None:
        raise SaveError(f"{folder} was saved before its layers were chosen, so it records no choice")
    return Selection.from_dict(selection)


def _parse_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it stands, after its format is checked."""
    path = folder / MANIFEST
    if not path.is_file():
        if not (folder / CONFIG).is_file():
            raise SaveError(lacking(folder, CONFIG))
        raise SaveError(
            f"{folder} has no {MANIFEST}: it is plain LoRA on all layers (select: all), was not saved by layerpeft, or "
            "saving was cut short. To load it all the same, unchecked and without the record: "
            f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
        )
    manifest = read_json(path)
    found = manifest.get("format")
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
    if size != expected["size"] or fingerprint(path) != expected:
        return f"{name} was altered (size or SHA-256 differs)"
    return tensors_trouble(path) if name in (*WEIGHTS, *STATES) else None
