"""What layerpeft has written into a folder, by size and SHA-256: that alone may it replace or remove there."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerpeft.errors import SaveError
from layerpeft.integrations.files import digest_of, fingerprint, read_json, replace_file, unused
from layerpeft.saving.manifest import MANIFEST

RECORD = ".layerpeft_files.json"
# files that hold the sizes and digests of those beside them, and their own: of a run, an adapter, scores, a comparison
VOUCHERS = (RECORD, MANIFEST, "scores.json", "compare.json")


def strangers(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of these names (paths below the folder) under which something lies that layerpeft did not write as it is now."""
    there = [name for name in names if os.path.lexists(folder / name)]
    known = [listed(folder / name) for name in VOUCHERS] if there else []
    return [name for name in there if not _is_ours(folder / name, [said[name] for said in known if name in said])]


def _is_ours(path: Path, known: list[Any]) -> bool:
    if path.name in VOUCHERS and listed(path) and not path.is_symlink():
        return True
    try:
        return not path.is_symlink() and path.is_file() and bool(known) and fingerprint(path) in known
    except OSError:
        return False


def room(folder: Path, names: Iterable[str]) -> Path:
    """The folder for files of these names; a new one in it where something else has come to lie under one of them."""
    return unused(folder, "layerpeft") if strangers(folder, names) else folder


def completed(folder: Path) -> set[str]:
    """The folders in it whose files were put on record."""
    return {Path(name).parts[0] for name in listed(folder / RECORD) if len(Path(name).parts) > 1}


def files_below(folder: Path, part: str) -> list[str]:
    """Everything in a folder of it that is no folder itself, as paths below it; a link to a folder is no folder."""
    if (folder / part).is_symlink():
        return [part]
    found = [Path(at, name) for at, dirs, names in os.walk(folder / part) for name in (*names, *dirs)]
    return sorted(str(p.relative_to(folder)) for p in found if p.is_symlink() or not p.is_dir())


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Keeps a record of the files that are written into a folder inside."""
    before = _stamps(folder)
    yield
    put_on_record(folder, [name for name, stamp in _stamps(folder).items() if before.get(name) != stamp])


def put_on_record(folder: Path, names: Iterable[str]) -> None:
    """Adds files that were written just now to those that are known; those that are gone are forgotten."""
    known = {name: said for name, said in listed(folder / RECORD).items() if (folder / name).is_file()}
    known |= {name: fingerprint(folder / name) for name in names}
    vouch(folder / RECORD, {"format": 1}, known)


def vouch(path: Path, content: Mapping[str, Any], files: Mapping[str, Any] | Iterable[str]) -> None:
    """Writes a mapping as JSON, with what is known of files beside it, or with what they are now, and its own digest."""
    if not isinstance(files, Mapping):
        files = {name: fingerprint(path.parent / name) for name in files if (path.parent / name).is_file()}
    whole = json.loads(json.dumps({**content, "files": files}))
    replace_file(path, (json.dumps(whole | {"sha256": digest_of(whole)}, indent=1) + "\n").encode())


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {p.name: p.stat() for p in folder.iterdir() if p.is_file() and not p.is_symlink() and p.name != RECORD}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found.items()}


def listed(path: Path) -> dict[str, Any]:
    """The files that a record or a manifest vouches for, where nobody has touched it since; nothing where there is none."""
    try:
        found = read_json(path)
    except SaveError:
        return {}
    files = found.get("files")
    return files if found.get("sha256") == digest_of(found) and isinstance(files, dict) else {}
