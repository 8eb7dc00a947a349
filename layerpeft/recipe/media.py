"""Pictures and sounds with a table beside them that says what each is, in folders as `datasets` knows them (metadata.csv)."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from layerpeft.recipe.reading import Broken, Row, read

STEM, NAME = "metadata", "file_name"  # of such a table, and of its column; others that name files end in _file_name
KINDS = ("image", "audio")


def media_of(files: Sequence[Path]) -> str | None:
    """What files are that such tables name, `image` or `audio`, by the first of them; None of other tables."""
    for path in files if all(path.stem == STEM for path in files) else ():
        first = next((row for _, row in islice(read(path), 1) if not isinstance(row, Broken)), {})
        kind = (mimetypes.guess_type(str(first.get(NAME) or ""))[0] or "").partition("/")[0]
        if kind in KINDS:
            return kind
    return None


def tables(files: Sequence[Path]) -> list[Path]:
    """Those that say what the files of their folder are."""
    return [path for path in files if path.stem == STEM and media_of([path]) is not None]


def placed(rows: Iterator[Row], table: Path, media: str) -> Iterator[Row]:
    """The rows of such a table, with whole paths in columns of the files' kind."""
    for line, row in rows:
        yield line, row if isinstance(row, Broken) else {_called(k, media): _path(k, v, table) for k, v in row.items()}


def _called(column: str, media: str) -> str:
    return media if column == NAME else column.removesuffix(f"_{NAME}")


def _path(column: str, value: Any, table: Path) -> Any:
    names = column == NAME or column.endswith(f"_{NAME}")
    return str(table.parent / value) if names and isinstance(value, str) and value else value
