"""A checkpoint on disk, tensor by tensor: names, shapes and types are known before anything is read, and nothing is kept."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from layerpeft.errors import SaveError
from layerpeft.integrations.files import header_of, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, its shape and its type; its bytes follow from them."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a folder: name -> entry, in the order of the files."""

    folder: Path
    entries: Mapping[str, Entry]

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """Names of tensors by file."""
        found: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            found.setdefault(entry.file, []).append(name)
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the first floating tensor."""
        return next((e.dtype for e in self.entries.values() if e.dtype.is_floating_point), None)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in pages of the file that the system takes back when it needs them. Raises: KeyError, SaveError."""
        path = self.folder / self.entries[name].file
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise SaveError(f"{path} cannot be read: {error}") from error


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The safetensors checkpoint in a folder, its headers read; None where there is none.

    Raises: SaveError for files that are missing, truncated, or not what the index says.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return Checkpoint(folder, entries_of(folder / SINGLE))
    if not (folder / INDEX).is_file():
        return None
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise SaveError(f"{folder / INDEX} is truncated or altered: weight_map is not file by tensor")
    files = sorted(set(where.values()))
    found: dict[str, Entry] = {}
    for file in files:
        if file != os.path.basename(file):
            raise SaveError(f"{folder / INDEX} names {file!r}, which is not a file of this folder")
        found |= entries_of(folder / file)
    lost = sorted(name for name, file in where.items() if name not in found or found[name].file != file)
    if lost:
        raise SaveError(f"{folder} lacks {len(lost)} tensors that its index names, such as {lost[0]}")
    return Checkpoint(folder, found)


def entries_of(path: Path) -> dict[str, Entry]:
    """What one file holds, by its header. Raises: SaveError for a file that is missing, cut short, or not safetensors."""
    try:
        return {name: Entry(path.name, shape, _TYPES[kind]) for name, (shape, kind) in header_of(path).items()}
    except OSError as error:
        raise SaveError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise SaveError(f"{path} is truncated, or holds what layerpeft does not know: {error}") from error


def write_one_by_one(path: Path, entries: Mapping[str, Entry], pieces: Callable[[str], Iterable[torch.Tensor]]) -> None:
    """A safetensors file of these tensors, in this order; no more than a piece of one is in memory.

    `pieces(name)`: the numbers of a tensor in the type of its entry, part after part. Raises: SaveError for too many, or few.
    """
    names = {kind: name for name, kind in _TYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in entries.items():
        offsets = [at, at + entry.nbytes]
        header[name] = {"dtype": names[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin where the system reads them fastest
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            count = sum(file.write(_bytes(piece.to(entry.dtype))) for piece in pieces(name))
            if count != entry.nbytes:
                raise SaveError(f"{path}: {name} takes {entry.nbytes} bytes, and {count} were given")


def _bytes(piece: torch.Tensor) -> memoryview:
    numbers: Any = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)
