"""Where what is made by a seed lies: a folder of the user's caches for every version of what makes it."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from layerpeft.integrations.caches import caches
from layerpeft.recipe.toys import models, pictures, sounds, words

COUNTS = {"train": 240, "eval": 48}
FILES: dict[str, Callable[[Random], Iterator[tuple[dict[str, Any], bytes]]]] = {**pictures.MAKERS, **sounds.MAKERS}
SUFFIXES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(pictures.MAKERS, ("image", "png")),
    **dict.fromkeys(sounds.MAKERS, ("audio", "wav")),
}


def names() -> list[str]:
    """What can be made: folders of models, and files of rows."""
    rows = [f"{name}_{part}.jsonl" for name in (*words.ROWS, *FILES) for part in COUNTS]
    return sorted([*models.MAKERS, *rows])


def made(name: str) -> Path:
    """Where one of `names` lies; it is made the first time."""
    home = caches("toys") / _version()
    folder = home / (name if name in models.MAKERS else name.rpartition("_")[0])
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=home, prefix=f".{folder.name}."))
        try:
            (models.make if name in models.MAKERS else _rows)(folder.name, partial)
            os.chmod(partial, 0o755)
            with contextlib.suppress(OSError):  # another process was as fast
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder if name in models.MAKERS else folder / name


def _rows(kind: str, folder: Path) -> None:
    for number, (part, count) in enumerate(COUNTS.items()):
        draw = Random(number)
        made = (
            words.ROWS[kind](draw) if kind in words.ROWS else _beside(FILES[kind](draw), *SUFFIXES[kind], folder, part)
        )
        lines = [json.dumps(next(made)) + "\n" for _ in range(count)]
        (folder / f"{kind}_{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def _beside(made: Iterator[tuple[dict[str, Any], bytes]], key: str, suffix: str, folder: Path, part: str) -> words.Rows:
    """Rows that name a file each, which is written."""
    (folder / part).mkdir()
    for number, (row, data) in enumerate(made):
        path = f"{part}/{number:03d}.{suffix}"
        (folder / path).write_bytes(data)
        yield {key: path, **row}


@cache
def _version() -> str:
    """Of the code that makes it, and of the library that draws the weights."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.blake2b(sources + importlib.metadata.version("transformers").encode(), digest_size=6).hexdigest()
