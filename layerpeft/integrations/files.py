"""Files as wholes: written beside and swapped in, forced to disk, and known by size and SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def replace_file(path: Path, data: bytes) -> None:
    """Write beside the file and swap it in, so that a failure leaves the old one whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
