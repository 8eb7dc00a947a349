"""Files as wholes: written beside and swapped in, forced to disk, known by size and SHA-256, and read back within limits."""

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from layerpeft.errors import LayerpeftError, SaveError, mentions, told
from layerpeft.text import note

MOST = 256 << 20  # bytes of a text that is read back: more than any that layerpeft and Trainer write
LARGEST = 2**63  # of whole numbers that are read back
# what other libraries raise over damaged input
_FOREIGN = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, OSError, ImportError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


@contextmanager
def written_whole(target: Path, gives_way: Collection[str] = ()) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes its place at the end; on an error nothing is left.

    `target` must be new, or an empty folder, or a link to such; or it holds the files in `gives_way` (paths below it), which are
    removed, while others stay. Raises: SaveError where it is no longer so at the end: what was written then stays where it is.
    """
    target = Path(os.path.realpath(target))
    partial, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.{end}") for end in ("partial", "old"))
    made = [folder for folder in target.parents if not folder.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        raise
    try:
        if gives_way and target.is_dir():
            target.rename(old)
        elif target.is_dir():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        if old.is_dir() and not target.exists():
            old.rename(target)
        raise SaveError(
            f"{target} has been filled meanwhile ({error.strerror}); all of it lies in {partial}"
        ) from error
    if old.is_dir():
        _clear(old, target, gives_way)


def _clear(old: Path, new: Path, gives_way: Collection[str]) -> None:
    """Removes these files of a folder that was replaced; whatever else lay there goes on to the new one, if it has room for it."""
    for at, folders, names in os.walk(old, topdown=False):
        for name in (*names, *(n for n in folders if Path(at, n).is_symlink())):
            path = Path(at, name)
            below = path.relative_to(old)
            if os.fspath(below) in gives_way:
                path.unlink()
            elif not os.path.lexists(new / below):
                with contextlib.suppress(FileExistsError, NotADirectoryError):  # a file is where its folder was
                    (new / below.parent).mkdir(parents=True, exist_ok=True)
                    path.rename(new / below)
        if not os.listdir(at):
            os.rmdir(at)
    if old.is_dir():
        note(
            f"{new} holds files of the same names as what lay there before and was not layerpeft's, which now lies in {old}"
        )


def must_be_new(target: Path) -> str | None:
    """Why nothing can be written to a folder as a whole, or None where it is new or empty."""
    if target.is_symlink() and not target.exists():
        return f"{target} is a link that leads nowhere"
    if target.exists() and not target.is_dir():
        return f"{target} is a file: name a folder"
    if target.exists() and any(target.iterdir()):
        return f"{target} is not empty: name a new folder"
    return None


@contextmanager
def set_aside(paths: Iterable[Path]) -> Iterator[None]:
    """Inside, these files are out of the way; at the end they take the place of what was written under their names."""
    moved = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.kept") for path in paths}
    for path, beside in moved.items():
        path.rename(beside)
    try:
        yield
    finally:
        for path, beside in moved.items():
            beside.replace(path)


def unused(folder: str | os.PathLike[str], name: str) -> Path:
    """A path in a folder where nothing lies: this name, or the first of name-2, name-3, …"""
    return next(p for n in count(1) if not os.path.lexists(p := Path(folder, name if n == 1 else f"{name}-{n}")))


def inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder by itself, or by a link of the hub's cache, whose blobs lie two folders up."""
    real, home = path.resolve(), folder.resolve()
    return real.is_relative_to(home) or real.is_relative_to(home.parents[1] / "blobs")


@contextmanager
def replacing(path: Path, newer_than: int | None = None, shared: bool = False) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place at the end; on an error the old one stays as it was.

    With `newer_than` (nanoseconds) it is forced to disk, and its time stamp ends up after that. `shared`: other processes may
    write the same file just now, so what lies beside it is left alone.
    """
    for left in (
        () if shared else path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp")
    ):  # of a killed run
        left.unlink(missing_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        if newer_than is not None:
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            if beside.stat().st_mtime_ns <= newer_than:  # coarse clocks: has_weights() compares the two
                os.utime(beside, ns=(newer_than + 1_000_000, newer_than + 1_000_000))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if newer_than is None:
        return
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Swaps a file for one with this content, from any number of processes."""
    with replacing(path, shared=True) as beside:
        beside.write_bytes(data)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = 2**16  # bytes: with less than that left, whatever could not be written was too large


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Whether writing into the folder failed for want of room; writers of tensors raise errors of their own for it."""
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__ or error
    if any(isinstance(e, OSError) and e.errno in FULL or mentions(e, "os error 28", word=False) for e in chain):
        return True
    there = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), None)
    writes = isinstance(chain[0], RuntimeError | OSError | SafetensorError)
    return writes and there is not None and shutil.disk_usage(there).free < ROOM


def version_of(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """What a manifest says of these packages."""
    return {name: version_of(name) or "not installed" for name in packages}


def fingerprint(path: Path, durable: bool = False) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, streamed; `durable` first has it put on the disk."""
    with path.open("rb") as file:
        if durable:  # the manifest must never outlive what it vouches for; not every system syncs a file opened to read
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's own content, without the field that holds it; spacing and key order do not count."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- reading back: whatever lies there, it is one sentence -----------------------------------------------------------


def read_json(
    path: str | os.PathLike[str], error: type[LayerpeftError] = SaveError, finite: bool = True, kind: Any = dict
) -> Any:
    """What a JSON file holds, which has to be of this `kind`; `finite`: numbers have to be.

    Raises: `error` for a file that cannot be read, is cut short, too large or nested too deep, or holds anything else.
    """
    try:
        return parse_json(read_text(path), finite, kind)
    except OSError as why:
        raise error(f"{path} cannot be read: {why.strerror}") from why
    except ValueError as why:
        raise error(f"{path} is truncated or altered: {told(why, 300)}") from why


def read_text(path: str | os.PathLike[str], most: int = MOST, errors: str = "strict") -> str:
    """A text file in UTF-8. Raises: OSError; ValueError for another encoding (`errors`: as those of `bytes.decode`), for what is no
    file, and for too much."""
    if not (path := Path(path)).is_file() and path.exists() and not path.is_dir():
        raise ValueError("it is no ordinary file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it holds more than {most:,} bytes")
    return data.decode("utf-8-sig", errors)


def parse_json(text: str, finite: bool = True, kind: Any = dict) -> Any:
    """What a JSON text holds, which has to be of this kind. Raises: ValueError."""

    def number(digits: str, read: type = float) -> Any:
        found = read(digits)
        if finite and not (math.isfinite(found) if read is float else -LARGEST <= found < LARGEST):
            raise ValueError(f"the number {digits[:20]} is out of range")
        return found

    try:
        found = json.loads(
            text, parse_float=number, parse_constant=number, parse_int=lambda digits: number(digits, int)
        )
    except RecursionError as why:
        raise ValueError("it is nested too deep") from why
    except json.JSONDecodeError as why:
        raise ValueError(f"no JSON: {why}") from why
    if not isinstance(found, kind):
        raise ValueError("it holds something else")
    return found


@contextmanager
def as_written(what: object, error: type[LayerpeftError] = SaveError) -> Iterator[None]:
    """Inside, what was read back is taken apart. Raises: `error` for whatever is raised over it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FOREIGN as why:
        raise error(f"{what}: {type(why).__name__}: {told(why, 400)}") from why


def read_pickled(path: Path) -> Any:
    """What a torch.save file holds, its tensors without their numbers; nothing but plain data and tensors is made.

    Raises: ValueError for a file that is cut short, or holds anything else.
    """
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            return torch.load(path, map_location="meta", weights_only=True)
    except OSError as why:
        raise ValueError(why.strerror) from why
    except pickle.UnpicklingError as why:
        raise ValueError("it holds objects that could run code, which are not loaded") from why
    except Exception as why:  # whatever a damaged archive makes of itself
        raise ValueError(told(why, 200)) from why


def tensors_trouble(path: Path) -> str | None:
    """What keeps a file of weights from being one, or None; no tensor is read."""
    try:
        if path.suffix == ".safetensors":
            header_of(path)
        elif not isinstance(read_pickled(path), Mapping):
            return f"{path.name} holds no tensors by name"
    except (OSError, ValueError) as why:
        return f"{path.name} is truncated, or holds no tensors: {told(why, 200)}"
    return None


def header_of(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type (as "BF16") of every tensor in a safetensors file, in the order of the file.

    Raises: OSError where it cannot be read; ValueError where it is cut short, or no safetensors.
    """
    path.open("rb").close()  # the system's own word for what is wrong
    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def note_in(path: str | os.PathLike[str], key: str) -> Any:
    """What a safetensors file says beside its tensors under this key, parsed; an empty dict where it says nothing.

    Raises: ValueError for what is no JSON.
    """
    with safe_open(path, "np") as file:
        return parse_json((file.metadata() or {}).get(key, "{}"))
