"""What models and rows are called where others read it: by name, never by a place on the machine that trained."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from layerpeft.integrations.places import ADDRESS

_CACHED = re.compile(r"(models|datasets)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{7,64})[/\\]?$")
SHIPS = "layerpeft://"  # before the name of what comes with the package


@dataclass(frozen=True)
class Name:
    """What is said of a model or of rows: `local` ones have no address that means the same elsewhere; `revision` of the hub's."""

    name: str
    local: bool = True
    revision: str | None = None


def named(place: str | os.PathLike[str], near: Path | None = None) -> Name:
    """The name of what a path or an address means: the hub's, also of a copy in its cache, or the last part of a path. `near`: a
    folder, from which or from one above it a path that is not absolute may have been meant."""
    text = os.fspath(place)
    if cached := _CACHED.search(text):
        return Name(cached[2].replace("--", "/"), False, cached[3])
    scheme, _, rest = text.partition("://")
    if rest:
        return Name(rest.rstrip("/").rpartition("/")[2] or scheme)
    homes = [Path(), *((near.absolute(), *near.absolute().parents) if near is not None else ())]
    if ADDRESS.fullmatch(text) and not any((home / text).exists() for home in homes):
        return Name(text, False)
    last = PureWindowsPath(text).name if "\\" in text else Path(text).name
    return Name(last or Path(text).absolute().name)
