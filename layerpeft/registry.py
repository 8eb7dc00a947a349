"""Plug-ins by file name: `scorers/depth.py` is the scorer `depth`; other packages join through entry points."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from layerpeft.errors import ConfigError, unknown


@cache
def names(package: str) -> tuple[str, ...]:
    """Names of all plug-ins of a package (`"layerpeft.scorers"`), own files first, then entry points of that group."""
    path = importlib.import_module(package).__path__
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
    return importlib.import_module(f"{package}.{name}")


def _outside(package: str):
    own = {m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)}
    found = [e for e in entry_points(group=package)]
    clash = sorted(e.name for e in found if e.name in own)
    if clash:
        raise ConfigError(f"entry points of {package} may not replace built-in names: {', '.join(clash)}")
    return found
