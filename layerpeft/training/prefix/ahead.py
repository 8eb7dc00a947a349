"""What was filled ahead: that the states of all rows lie in a folder, and by what a training knows them for its own unread.

It stands in the folder of the states as `ahead.json`, written once all of them are there. A training that loads nothing below the
cut has no weights to take a digest of: it goes by the files of the checkpoint, and by how those were read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, SaveError, differences
from layerpeft.integrations.files import read_json, replace_file
from layerpeft.saving.shards import open_checkpoint
from layerpeft.training.prefix import folders
from layerpeft.training.prefix.folders import AHEAD
from layerpeft.training.prefix.running import Form

FORMAT = 1
CHUNK = 4 << 20  # bytes of a file that are read at a time
# Of a config, what changes nothing that blocks compute.
APART = frozenset(
    name
    for line in (
        "_name_or_path architectures auto_map transformers_version dtype torch_dtype quantization_config attn_implementation",
        "use_cache return_dict output_attentions output_hidden_states output_router_logits",
        "id2label label2id num_labels problem_type bos_token_id eos_token_id pad_token_id _attn_implementation",
    )
    for name in line.split()
)


@dataclass(frozen=True)
class Mark:
    """A file: its bytes, the time of its last change (nanoseconds), and the XXH3 of its content (128 bits, hexadecimal)."""

    size: int
    modified: int
    digest: str


@dataclass(frozen=True)
class Filled:
    """How many different rows there were, and how many tokens they have together."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Ahead:
    """A complete filling. `belongs`: what the folder belongs to (`fingerprint.belongs_to`: the digest of weights below, the name of
    the block, …); `cut`: its number; `bits`: of the store (8, or None).

    How the lower part was loaded: `files` of the checkpoint by name; `config`: digest of what its config says of computing
    (`config_digest`); `dtype` of the weights; `packed`: precision of the linears below that are packed, by name. How it ran:
    `cast`: what autocast casts to, None without; `entering`: the type of what enters the cut; `forms`: how many None each block
    below hands on besides hidden states (-1: these alone, and no tuple). `train`, `held_out`: the rows.
    """

    belongs: Mapping[str, str]
    cut: int
    bits: int | None
    files: Mapping[str, Mark]
    config: str
    dtype: str
    packed: Mapping[str, str]
    cast: str | None
    entering: str
    forms: tuple[int, ...]
    train: Filled
    held_out: Filled

    @property
    def block(self) -> str:
        """The name of the block at the cut."""
        return self.belongs["cut"]

    def differs(self, **wanted: Any) -> list[str]:
        """What a training wants otherwise, of the fields that it names (those of `belongs` by their own names), in words."""
        given = dict(self.belongs) | {f.name: getattr(self, f.name) for f in fields(self)}
        return differences({name: given[name] for name in wanted}, wanted)

    def holds_of(self, folder: Path) -> bool:
        """Whether the checkpoint in a folder has the same weights: files of the same size and time are taken for the same, others
        are read, and compared by their digests. Raises: SaveError."""
        names = _names(folder)
        return sorted(names) == sorted(self.files) and all(_same(folder / name, self.files[name]) for name in names)


def form_number(form: Form) -> int:
    """As `Ahead.forms` has it."""
    return -1 if form is None else len(form)


def marks_of(folder: Path) -> dict[str, Mark]:
    """Those of a checkpoint's files of weights, read whole, a piece at a time. Raises: SaveError."""
    return {name: _mark(folder / name) for name in _names(folder)}


def config_digest(config: Any) -> str:
    """Of what a model's config (of transformers) says of computing; not of where it lies, its type, its classes or its tokens."""
    return hashlib.sha256(json.dumps(_computing(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def write_ahead(folder: Path, found: Ahead) -> None:
    """Into a folder of states, whole or not at all. Raises: OSError."""
    with folders.locked(folder.parent):
        replace_file(folder / AHEAD, json.dumps({"format": FORMAT, **asdict(found)}, indent=1).encode())


def read_ahead(folder: Path) -> Ahead | None:
    """That of a folder of states; None where there is none, or none that this version understands."""
    try:
        given = read_json(folder / AHEAD)
        if given.pop("format", None) != FORMAT:
            return None
        for name in ("train", "held_out"):
            given[name] = Filled(**given[name])
        files = {name: Mark(**mark) for name, mark in given["files"].items()}
        return Ahead(**given | {"files": files, "forms": tuple(given["forms"])})
    except (OSError, LayerpeftError, TypeError, KeyError, AttributeError, ValueError):
        return None


def all_ahead(root: Path) -> Iterator[tuple[Path, Ahead]]:
    """Every complete filling below a place of states, with its folder."""
    with contextlib.suppress(OSError):
        for folder in sorted(folders.sizes(root)):
            if (found := read_ahead(folder)) is not None:
                yield folder, found


def _names(folder: Path) -> list[str]:
    found = open_checkpoint(folder)
    if found is None:
        raise SaveError(f"{folder} holds no weights as safetensors")
    return list(found.files)


def _same(path: Path, mark: Mark) -> bool:
    found = os.stat(path)
    if found.st_size != mark.size:
        return False
    return found.st_mtime_ns == mark.modified or _mark(path).digest == mark.digest


def _mark(path: Path) -> Mark:
    import xxhash  # nothing else needs it, and those who keep nothing need not load it

    found, data = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            while count := file.readinto(data):
                found.update(data[:count])
    except OSError as error:
        raise SaveError(f"{path} cannot be read: {error.strerror}") from error
    return Mark(status.st_size, status.st_mtime_ns, found.hexdigest())


def _computing(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _computing(v) for k, v in value.items() if k not in APART}
    return [_computing(v) for v in value] if isinstance(value, list | tuple) else value
