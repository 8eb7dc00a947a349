"""What lies here: where a path that a person wrote was looked for, and what is called much like it. No path is an address."""

from __future__ import annotations

import os
import re
from pathlib import Path

from layerpeft.errors import nearest

ADDRESS = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # what an address on the hub looks like


def expanded(text: str) -> Path:
    """The path that a person wrote: `~` is home, and stays as it is for somebody unknown."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def looked_for(name: str, home: Path | None = None) -> str:
    """Where a path was looked for, to stand in a sentence; `home`: where else than in the current folder."""
    path = expanded(name)
    places = dict.fromkeys(str(p.absolute()) for p in ([path] if home is None else [path, home / path]))
    return f"looked for {' and '.join(places)}"


def missing(what: str, name: str, home: Path | None = None) -> str:
    """A sentence on a file or folder that is not there: its name, where it was looked for, and what is called much like it."""
    return f"no {what} {name!r} ({looked_for(name, home)}){meant(name, home)}"


def meant(name: str | os.PathLike[str], home: Path | None = None) -> str:
    """What is here under a name much like it, as a question to stand behind a sentence; nothing where nothing is."""
    close = near(os.fspath(name), home)
    return f". Did you mean {close!r}?" if close else ""


def near(name: str, home: Path | None = None) -> str | None:
    """The path that is here, or in `home`, and of which every part that is not is spelled much like it; None without one."""
    path = expanded(name)
    for start in [Path()] if home is None else [Path(), home]:
        try:
            found = _near(start / path)
        except (OSError, ValueError):  # no folder, not to be read, or no name of a file at all
            found = None
        if found is not None:
            return str(found if path.is_absolute() else found.relative_to(start))
    return None


def _near(path: Path) -> Path | None:
    """Raises: OSError, ValueError."""
    there, rest = path, list[str]()
    while not os.path.lexists(there):
        rest.insert(0, there.name)
        there = there.parent
    for number, part in enumerate(rest, 1):
        if not (there / part).exists():
            with os.scandir(there) as held:
                names = [entry.name for entry in held if number == len(rest) or entry.is_dir()]
            seen = sorted(name for name in names if not name.startswith(".") or part.startswith("."))
            stems = {Path(name).stem: name for name in reversed(seen)} if not Path(part).suffix else {}
            close = nearest(part, seen) or stems.get(nearest(part, stems) or "")
            if close is None:
                return None
            part = close
        there /= part
    return there if rest else None


def neither(what: str, name: str, home: Path | None = None) -> str:
    """A sentence on a name that is nothing here, and that the hub does not give; why it does not is to follow."""
    hub = " The hub does not give it either" if meant(name, home) else ", and the hub does not give it"
    return f"{missing(what, name, home)}{hub}"
