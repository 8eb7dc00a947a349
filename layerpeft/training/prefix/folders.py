"""A folder that the states of several bases and cuts share: who uses what, how large it is, and what goes first."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerpeft.integrations.caches import caches

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

USED, BELONGS, LOCK = "used", "belongs.json", ".lock"
AHEAD = "ahead.json"  # that all rows of a training were filled in
DATA, JOURNAL = ".data", ".journal"
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
BEAT = 8  # bytes of a number in `USED`, which changes with whatever is written beside it
_NAME = re.compile(r"[0-9a-f]{32}")
_locks: set[int] = set()


class Handle:
    """An open file, for as long as somebody holds this."""

    def __init__(self, path: Path, *flags: int) -> None:
        """Opened with the first of these flags with which it may be. Raises: OSError."""
        for number, flag in enumerate(flags):
            try:
                self.fd = os.open(path, flag | os.O_CLOEXEC, 0o666)
                return
            except OSError as error:  # a file that is not there yet may be by now, and would be open to read alone
                if error.errno not in FORBIDDEN or number == len(flags) - 1:
                    raise

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self._close(self.fd)

    _close = staticmethod(os.close)  # there when the interpreter ends

    @property
    def size(self) -> int:
        """Bytes. Raises: OSError."""
        return os.fstat(self.fd).st_size

    def read_into(self, data: memoryview, offset: int) -> int:
        """Fills `data` with what lies there; how many bytes there were. Raises: OSError."""
        done = 0
        while done < len(data) and (count := os.preadv(self.fd, [data[done:]], offset + done)):
            done += count
        return done

    def write(self, data: memoryview, offset: int) -> None:
        """All of it. Raises: OSError, with a part of it written."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], offset + done)


def default_root() -> Path:
    """Where states are kept if nobody says where: `prefix` in LAYERPEFT_CACHE, or in `layerpeft` in the user's folder of caches."""
    return caches("prefix")


def folder_of(root: Path, belongs: Mapping[str, Any]) -> Path:
    """The folder of what belongs to the same things."""
    return root / hashlib.blake2b(_json(belongs), digest_size=16).hexdigest()


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One process (and thread) at a time. Raises: OSError where nothing can be locked."""
    if fcntl is None:
        raise OSError("this system has no locks between processes")
    root.mkdir(parents=True, exist_ok=True)
    handle = Handle(root / LOCK, os.O_RDWR | os.O_CREAT, os.O_RDONLY)
    _locks.add(handle.fd)
    try:
        fcntl.flock(handle.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle.fd, fcntl.LOCK_UN)
    finally:
        _locks.discard(handle.fd)


def _not_in_a_child() -> None:
    """A fork while another thread writes: the child would hold the lock on for as long as it lives."""
    null = os.open(os.devnull, os.O_RDONLY) if _locks else None
    for fd in _locks:
        os.dup2(null, fd, inheritable=False)  # type: ignore[arg-type]
    _locks.clear()
    if null is not None:
        os.close(null)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_not_in_a_child)


def use(folder: Path) -> Handle | None:
    """Marks a folder as used for as long as the handle is held; None where there is none. Raises: OSError."""
    try:
        handle = Handle(folder / USED, os.O_RDWR, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if fcntl is None:
        return None
    fcntl.flock(handle.fd, fcntl.LOCK_SH)
    with contextlib.suppress(OSError):
        os.utime(handle.fd)
    return handle if is_there(folder, handle) else None


def is_there(folder: Path, used: Handle) -> bool:
    """Whether the folder that is used has been neither removed nor made anew."""
    try:
        return os.path.samestat(os.stat(folder / USED), os.fstat(used.fd))
    except OSError:
        return False


def make(folder: Path, belongs: Mapping[str, Any]) -> Handle:
    """A folder for what belongs to this, in use, where there is none; inside `locked`. Raises: OSError."""
    folder.mkdir(exist_ok=True)
    (folder / BELONGS).write_bytes(_json(belongs))
    (folder / USED).write_bytes(bytes(BEAT))
    handle = use(folder)
    if handle is None:
        raise FileNotFoundError(2, "removed while it was made", str(folder))
    return handle


def beat(used: Handle) -> None:
    """Says to all who use a folder that something was written there, and that it was used now; inside `locked`. Raises: OSError."""
    count = int.from_bytes(os.pread(used.fd, BEAT, 0), "little") + 1
    os.pwrite(used.fd, (count % 2 ** (8 * BEAT)).to_bytes(BEAT, "little"), 0)


def bytes_of_new(belongs: Mapping[str, Any]) -> int:
    """Bytes that `make` writes."""
    return len(_json(belongs)) + BEAT


def size_of_folder(folder: Path) -> int:
    """Bytes of all files in it, 0 where there is none."""
    found = 0
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                found += file.stat(follow_symlinks=False).st_size
    return found


def sizes(root: Path) -> dict[Path, int]:
    """Bytes of each folder of states there. What else lies there is nobody's business. Raises: OSError."""
    names = [Path(f.path) for f in os.scandir(root) if _NAME.fullmatch(f.name) and f.is_dir(follow_symlinks=False)]
    return {folder: size_of_folder(folder) for folder in names if (folder / USED).is_file()}


def half_of_the_rest(root: Path) -> int:
    """A limit where none is given: half of what the disk would have free without what is kept there. Raises: OSError."""
    return (shutil.disk_usage(root).free + sum(sizes(root).values())) // 2


def room(root: Path, own: Path, least: int, need: int, limit: int) -> int:
    """Bytes that may be written there, inside `locked`. Where `need` is more, folders that nobody uses go first, the longest
    unused of them before others; not where even `least` would not fit without all others. Raises: OSError."""
    found = sizes(root)
    left, others = limit - sum(found.values()), {f: s for f, s in found.items() if f != own}
    if left + sum(others.values()) < least:
        return left
    for folder in sorted(others, key=_last_use):
        if left >= need:
            break
        if _remove(folder):
            left += others[folder]
    return left


def _last_use(folder: Path) -> float:
    try:
        return (folder / USED).stat().st_mtime
    except OSError:
        return 0.0


def _remove(folder: Path) -> bool:
    """Whether nobody uses it, and it is gone."""
    try:
        handle = Handle(folder / USED, os.O_RDWR)
        fcntl.flock(handle.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files = sorted(folder.iterdir(), key=lambda file: file.name == USED)  # which says that it is one of ours
        for file in files:
            own = file.name in (USED, BELONGS, AHEAD) or file.name.startswith(f".{AHEAD}.")
            if own or file.suffix in (DATA, JOURNAL):
                file.unlink()
        folder.rmdir()
    except OSError:
        return False
    return True


def _json(belongs: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(belongs), sort_keys=True, indent=1, ensure_ascii=False).encode()
