"""Plug-ins by file name: `scorers/depth.py` is the scorer `depth`; other packages join through entry points."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from layerpeft.errors import ConfigError, unknown

# groups of entry points whose own plug-ins lie in a folder of another name
_FOLDERS = {group: group.replace(".", ".selection.") for group in ("layerpeft.scorers", "layerpeft.picks")}


@cache
def names(package: str) -> tuple[str, ...]:
    """Names of all plug-ins of a group (`"layerpeft.scorers"`), own files first, then its entry points."""
    path = importlib.import_module(_folder(package)).__path__
    own = [m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")]
    return tuple(dict.fromkeys(own + [e.name for e in _outside(package)]))


@cache
def get(package: str, name: str) -> ModuleType:
    """The module behind a plug-in name.

    Raises: ConfigError for a name that no file and no entry point has; an import error inside the plug-in is let through.
    """
    if name not in names(package):
        raise ConfigError(unknown(package.rsplit(".", 1)[-1].rstrip("s"), name, names(package)))
    for entry in _outside(package):
        if entry.name == name:
            return entry.load()
    return importlib.import_module(f"{_folder(package)}.{name}")


def _outside(package: str):
    own = {m.name for m in pkgutil.iter_modules(importlib.import_module(_folder(package)).__path__)}
    found = [e for e in entry_points(group=package)]
    clash = sorted(e.name for e in found if e.name in own)
    if clash:
        raise ConfigError(f"entry points of {package} may not replace built-in names: {', '.join(clash)}")
    return found


def _folder(group: str) -> str:
    return _FOLDERS.get(group, group)
