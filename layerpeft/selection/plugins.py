"""Plug-ins by file name: `scorers/depth.py` is the scorer `depth`; other packages join through entry points.

What a plug-in of a group has to hold stands in the group's own `__init__`: `HOLDS`, and `Traits` for what it says of itself.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from layerpeft.errors import ConfigError, Problems, unknown
from layerpeft.integrations.code import ran
from layerpeft.selection.typecheck import check

# groups of entry points whose own plug-ins lie in a folder of another name
_FOLDERS = {group: group.replace(".", ".selection.") for group in ("layerpeft.scorers", "layerpeft.picks")}


_files: dict[tuple[str, str], ModuleType] = {}  # those that a recipe brings, by the path that it writes


def names(package: str) -> tuple[str, ...]:
    """Names of all plug-ins of a group (`"layerpeft.scorers"`), own files first, then its entry points, then a recipe's own."""
    return _installed(package) + tuple(name for group, name in _files if group == package)


@cache
def _installed(package: str) -> tuple[str, ...]:
    path = importlib.import_module(_folder(package)).__path__
    own = [m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")]
    return tuple(dict.fromkeys(own + [e.name for e in _outside(package)]))


def from_file(package: str, name: str, path: Path, data: bytes) -> None:
    """Makes a plug-in of a file's code, which runs here, under the name by which a recipe calls it; `data`: what the file held.

    Raises: ConfigError for code that fails, or lacks what its group asks for.
    """
    module = ran(name, path, data)
    problems = Problems(f"{name} ({path})")
    _check(module, package, problems)
    problems.raise_if_any(ConfigError)
    _files[package, name] = module


def get(package: str, name: str) -> ModuleType:
    """The module behind a plug-in name. Raises: ConfigError as below."""
    return _files.get((package, name)) or _get(package, name)


@cache
def _get(package: str, name: str) -> ModuleType:
    """The module behind a plug-in name.

    Raises: ConfigError for a name that no file and no entry point has, and for a plug-in that lacks what its group asks for; an
    error while it is imported is let through.
    """
    if name not in names(package):
        raise ConfigError(unknown(package.rsplit(".", 1)[-1].rstrip("s"), name, names(package)))
    entry = next((e for e in _outside(package) if e.name == name), None)
    module = entry.load() if entry else importlib.import_module(f"{_folder(package)}.{name}")
    problems = Problems(f"{package}: {name} ({entry.value if entry else module.__name__})")
    _check(module, package, problems)
    problems.raise_if_any(ConfigError)
    return module


def _check(module: Any, package: str, problems: Problems) -> None:
    group = importlib.import_module(_folder(package))
    if hasattr(group, "Traits"):
        _check_held(module, group, problems)
        _check_traits(module, group, problems)


def traits(package: str, name: str) -> Any:
    """What a plug-in says of itself: its `TRAITS`, or the defaults of its group's `Traits`."""
    given = getattr(get(package, name), "TRAITS", None)
    return importlib.import_module(_folder(package)).Traits() if given is None else given


def _check_held(module: Any, group: Any, problems: Problems) -> None:
    options = getattr(module, "Options", None)
    if not isinstance(options, type) or not is_dataclass(options):
        problems.add("Options: missing; a frozen dataclass, without fields where there is nothing to choose")
    else:
        for bare in (f for f in fields(options) if f.init and f.default is MISSING and f.default_factory is MISSING):
            problems.add(f"Options.{bare.name}: has no default")
    for forms in group.HOLDS:
        if not any(callable(getattr(module, form.partition("(")[0], None)) for form in forms):
            problems.add(f"{' or '.join(forms)}: missing")


def _check_traits(module: Any, group: Any, problems: Problems) -> None:
    """A trait is said in `TRAITS` alone: constants that look like one are refused, since nobody would read them."""
    known = {f.name.upper(): f.name for f in fields(group.Traits)}
    given, road = getattr(module, "TRAITS", None), f"with Traits from {group.__name__}"
    if isinstance(given, group.Traits):
        check(group.Traits, vars(given), problems, every=True)
    elif given is not None:
        problems.add(f"TRAITS = {given!r} is not read; write TRAITS = Traits(…), {road}")
    for name, value in vars(module).items():
        shouted = name.isupper() and not name.startswith("_") and isinstance(value, int | float)
        close = get_close_matches(name, known, n=1, cutoff=0.85) if shouted else []
        if close:
            problems.add(f"{name} = {value!r} is not read; write TRAITS = Traits({known[close[0]]}={value!r}), {road}")
        elif isinstance(value, group.Traits) and name != "TRAITS":
            problems.add(f"{name} = {value!r} is not read; its name has to be TRAITS")


def _outside(package: str) -> list[EntryPoint]:
    return _entries(package, entry_points)


@cache  # all installed packages are looked through; whoever asks in another way is answered anew
def _entries(package: str, ask: Callable[..., Iterable[EntryPoint]]) -> list[EntryPoint]:
    own = {m.name for m in pkgutil.iter_modules(importlib.import_module(_folder(package)).__path__)}
    found = list(ask(group=package))
    clash = sorted(e.name for e in found if e.name in own)
    if clash:
        raise ConfigError(f"entry points of {package} may not replace built-in names: {', '.join(clash)}")
    return found


def _folder(group: str) -> str:
    return _FOLDERS.get(group, group)
