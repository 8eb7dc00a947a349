"""Results: a line of JSON for every run, written as it comes, so that an interrupted experiment goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.run import Run

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Store:
    """A folder with a file of lines for every cell. Several processes may write: no run is made twice."""

    folder: Path = RESULTS

    def path(self, cell: str) -> Path:
        """The file of a cell."""
        return self.folder / f"{cell.replace('/', '-')}.jsonl"

    def lines(self, cell: str) -> dict[str, dict[str, Any]]:
        """What is there, by the key of its run. A line that a kill has torn is not there."""
        path = self.path(cell)
        found = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            found[json.dumps(line["run"], sort_keys=True)] = line
        return found

    def write(self, run: Run, result: dict[str, Any]) -> None:
        """Adds a line; it is on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"run": json.loads(run.key), **result}
        with self.path(run.cell).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            torn = file.tell() > 0 and _last(file) != b"\n"
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def claim(self, run: Run, wait: bool = False) -> Iterator[bool]:
        """Whether this process may make a run: it is not there, and nobody else is at it (or, where it waits, is any more). A
        claim ends with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f".{run.cell.replace('/', '-')}.{abs(hash_of(run)):x}.claim"
        with place.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield run.key not in self.lines(run.cell)
            finally:
                place.unlink(missing_ok=True)


def by_rows(data: Mapping[str, Any]) -> str:
    """JSON with a line for every row of a list."""
    parts = [
        f"{json.dumps(name)}: {_listed(value) if isinstance(value, list) else json.dumps(value)}"
        for name, value in data.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _listed(rows: list[Any]) -> str:
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]"


def _last(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def hash_of(run: Run) -> int:
    """A number of a run that is the same in every process."""
    import xxhash

    return xxhash.xxh64_intdigest(run.key.encode())
