"""Code that a recipe or a model brings with it: named before it runs, and not run at all where it is kept out."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

from layerpeft.errors import ConfigError, told
from layerpeft.integrations.places import meant
from layerpeft.text import is_first, some

MOST = 1 << 20  # bytes of a file of code
_OUT: ContextVar[str] = ContextVar("how code that is kept out may run", default="")
_named: set[str] = set()
forget = _named.clear  # a command has ended: the next one names what runs again


@contextmanager
def kept_out(cure: str) -> Iterator[None]:
    """Inside, no such code runs; `cure` says how it may."""
    token = _OUT.set(cure)
    try:
        yield
    finally:
        _OUT.reset(token)


def admit(asked: str, sources: Sequence[str]) -> None:
    """Says on standard error, once, what runs now and what asks for it. Raises: ConfigError where it is kept out."""
    told = some(sources, 8, ", … ({} more)")
    if _OUT.get():
        raise ConfigError(f"{asked}: would run code that is not layerpeft's ({told}); {_OUT.get()}")
    text = f"layerpeft: {asked}: runs code that is not layerpeft's: {told}"
    if text not in _named and is_first():
        print(text, file=sys.stderr, flush=True)
    _named.add(text)


def code_beside(name: str | os.PathLike[str], folder: Path, asked: str) -> tuple[Path, bytes]:
    """A file of code that lies in `folder` (where the recipe does) or below, as bytes, which `admit` has named by then.

    Run these bytes: the file may be another one a moment later. Raises: ConfigError for a file that lies elsewhere, is none, or
    is kept out.
    """
    path, data = file_beside(name, folder, asked)
    admit(asked, [named(path, data)])
    return path, data


def file_beside(name: str | os.PathLike[str], folder: Path, asked: str) -> tuple[Path, bytes]:
    """The same to look at, not to run."""
    home = folder.resolve()
    path = (home / name).resolve()
    if not path.is_relative_to(home):
        raise ConfigError(f"{asked}: code is taken from beside the recipe alone ({home}), and this is {path}")
    if not path.is_file() or path.stat().st_size > MOST:
        raise ConfigError(f"{asked}: {path} is no file of code{meant(path)}")
    return path, path.read_bytes()


def ran(name: str, path: Path, data: bytes) -> ModuleType:
    """A module of a file's code, which runs here; `data`: what the file held, `name`: what asks for it.

    Raises: ConfigError for code that fails.
    """
    module = ModuleType(f"layerpeft_recipe_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where type hints are looked up
    try:
        exec(compile(data, str(path), "exec"), vars(module))
    except Exception as error:  # it is anybody's
        raise ConfigError(f"{name}: {path}: {type(error).__name__}: {told(error, 300)}") from error
    return module


def named(path: Path, data: bytes | None = None) -> str:
    """A file and the start of its SHA-256."""
    digest = hashlib.sha256(path.read_bytes() if data is None else data).hexdigest()
    return f"{path} (SHA-256 {digest[:16]}…)"
