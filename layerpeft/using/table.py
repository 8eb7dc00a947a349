"""Predictions as a file of rows, CSV, JSON lines or parquet: written batch by batch, there whole at the end or not at all."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpeft.errors import UsageError, hint
from layerpeft.integrations.files import replacing
from layerpeft.integrations.places import meant

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
Rows = Sequence[Mapping[str, Any]]


def check_out(out: str, overwrite: bool) -> Path:
    """Raises: UsageError where nothing can be written there."""
    path = Path(out).expanduser()
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: ends in none of {', '.join(SUFFIXES)}.{hint(path.suffix, SUFFIXES)}")
    check_new(path, overwrite)
    return path


def check_new(path: Path, overwrite: bool) -> None:
    """Raises: UsageError where something lies there, or no folder is."""
    if path.is_dir() or path.exists() and not overwrite:
        raise UsageError(f"--out {path}: is there already{'' if path.is_dir() else '; --overwrite replaces it'}")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no folder {path.parent}{meant(path.parent)}")


def short(value: Any) -> Any:
    """A value with the digits that single precision has."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, Mapping):
        return {k: short(v) for k, v in value.items()}
    return [short(v) for v in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def writing(path: Path, columns: Mapping[str, str]) -> Iterator[Callable[[Rows], None]]:
    """What takes rows of these columns (text, number, count, object or vector) and writes them; on an error nothing is left."""
    with replacing(path) as beside:
        made = {".jsonl": _lines, ".parquet": _parquet}.get(path.suffix, _cells)
        with made(beside, columns, path.suffix) as write:
            yield write


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


@contextlib.contextmanager
def _cells(path: Path, columns: Mapping[str, str], suffix: str) -> Iterator[Callable[[Rows], None]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n", delimiter="\t" if suffix == ".tsv" else ",")
        table.writerow(columns)
        yield lambda rows: table.writerows([[_flat(row.get(name)) for name in columns] for row in rows])


@contextlib.contextmanager
def _lines(path: Path, columns: Mapping[str, str], suffix: str) -> Iterator[Callable[[Rows], None]]:
    with path.open("w", encoding="utf-8") as file:

        def write(rows: Rows) -> None:
            for row in rows:
                file.write(json.dumps({n: row.get(n) for n in columns}, ensure_ascii=False, allow_nan=False) + "\n")

        yield write


@contextlib.contextmanager
def _parquet(path: Path, columns: Mapping[str, str], suffix: str) -> Iterator[Callable[[Rows], None]]:
    import pyarrow
    import pyarrow.parquet

    kinds = {"number": pyarrow.float64(), "count": pyarrow.int64(), "vector": pyarrow.list_(pyarrow.float32())}
    schema = pyarrow.schema([(name, kinds.get(kind, pyarrow.string())) for name, kind in columns.items()])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:

        def write(rows: Rows) -> None:
            lists = {
                n: [row.get(n) if k == "vector" else _flat(row.get(n)) for row in rows] for n, k in columns.items()
            }
            file.write_table(pyarrow.table(lists, schema=schema))

        yield write
