"""Files as wholes: written beside and swapped in, forced to disk, and known by size and SHA-256."""

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from layerpeft.errors import mentions


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which takes its place at the end; on an error nothing is left.

    `target` must be new, or an empty folder.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing(path: Path, newer_than: int | None = None, shared: bool = False) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place at the end; on an error the old one stays as it was.

    With `newer_than` (nanoseconds) it is forced to disk, and its time stamp ends up after that. `shared`: other processes may
    write the same file just now, so what lies beside it is left alone.
    """
    for left in () if shared else path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a run that was killed here
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
    """What a safetensors file says beside its tensors under this key, parsed; an empty dict where it says nothing."""
    with safe_open(path, "np") as file:
        return json.loads((file.metadata() or {}).get(key, "{}"))
