"""What layerpeft tells a person while it works: to standard error, from the first process, without tearing progress bars."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

logger = logging.getLogger("layerpeft")
_PRINTED: ContextVar[set[str] | None] = ContextVar("printed", default=None)  # lines, inside of `once`

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(?:(?:([KMGT])(I?))?(B))?\s*", re.IGNORECASE)
LEAST, LEAST_WRITTEN = 1024, 1 << 20  # bytes: a number, and one in a text, below that rather lacks its unit


def is_first() -> bool:
    """True in the process that prints and writes. A RANK that an earlier launcher left behind, without other processes, is none."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "1") or os.environ.get("RANK", "0") in ("", "0")


def left_behind() -> str | None:
    """What of a launcher stands in the environment although this is none of its processes, as a sentence with its cure.

    Training would wait for processes that never come, or end as one that is not the first, which writes nothing.
    """
    given = {n: os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR") if os.environ.get(n)}
    numbers = {n: v for n, v in given.items() if n != "MASTER_ADDR"}
    shown, names = " ".join(f"{n}={v}" for n, v in given.items()), " ".join(given)
    if all(re.fullmatch(r"-?\d+", v) for v in numbers.values()):
        world, rank = int(numbers.get("WORLD_SIZE", 1)), int(numbers.get("RANK", 0))
        launched = world > 1 or int(numbers.get("LOCAL_RANK", -1)) >= 0
        if not launched or len(given) - ("LOCAL_RANK" in given) == 3 and 0 <= rank < world:
            return None
    return (
        f"the environment says {shown}, as in one of several processes, and does not say all that those are told (RANK below "
        f"WORLD_SIZE, MASTER_ADDR): `unset {names}`, or start with torchrun or accelerate launch"
    )


def note(message: str) -> None:
    """Prints one line, and logs it at INFO. Silent in all but the first process, and with LAYERPEFT_QUIET=1."""
    logger.info(message)
    printed = _PRINTED.get()
    if printed is not None and message in printed:
        return
    if printed is not None:
        printed.add(message)
    if is_first() and os.environ.get("LAYERPEFT_QUIET") != "1":
        from tqdm.auto import tqdm  # once the command has said whether there are bars

        tqdm.write(on_screen(f"[layerpeft] {message}", sys.stderr), file=sys.stderr)


@contextmanager
def once() -> Iterator[None]:
    """Inside, a line that `note` has printed is not printed again."""
    before = _PRINTED.set(set())
    try:
        yield
    finally:
        _PRINTED.reset(before)


def on_screen(text: str, file: TextIO) -> str:
    """A text on its way to a file: on a terminal long lines are broken at blanks; those that are set in, as commands to paste and
    rows of tables, stay whole."""
    if not file.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(part for line in text.split("\n") for part in _broken(line, width))


def _broken(line: str, width: int) -> list[str]:
    if cells(line) <= width or line.startswith("  "):
        return [line]
    lines, held = [], ""
    for word in re.findall(r"\s*\S+", line):
        if held and cells(held) + cells(word) > width:
            lines.append(held)
            held = f"  {word.lstrip()}"
        else:
            held += word
    return [*lines, held + line[len(line.rstrip()) :]]


def grid(rows: Sequence[Sequence[str]], align: str, widths: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """Rows of cells as aligned lines, `align` being "<" or ">" for each column, the last one for all that follow.
    A column is as wide as its widest cell, or, where `widths` are given, as they say."""
    widths = widths or [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    lines = ([f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)] for row in rows)
    return [gap.join(line).rstrip() for line in lines]


def some(names: Sequence[str], most: int = 4, more: str = " …") -> str:
    """The first names, and a sign that there are more ("{}" in it: how many)."""
    return ", ".join(names[:most]) + (more.format(len(names) - most) if len(names) > most else "")


def literal(text: str) -> str:
    """A text in double quotes, as Python reads it: JSON would take a character beyond U+FFFF apart."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def counted(number: int, what: str) -> str:
    """So many of something, as "1 row" and "2 rows"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def cells(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if _written_over(c) else 1 for c in text)


def _written_over(c: str) -> bool:
    return bool(unicodedata.combining(c)) or unicodedata.category(c) in ("Mn", "Me")


def measured(value: float) -> str:
    """A number that was measured: four places, or powers of ten where these say nothing or take a line."""
    return f"{value:.4f}" if not value or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def size_of(value: object) -> int | None:
    """Bytes in a text such as "6GB" (powers of 1000), "6GiB" (of 1024) or "512B", or a whole number of them; None of what is no
    size, and of a small number without a unit, which rather lacks it."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= LEAST:
        return value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[4] is None and float(found[1]) < LEAST_WRITTEN:
        return None
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper())
    return int(size) if math.isfinite(size) else None


def no_size(value: object) -> str:
    """A sentence on what `size_of` makes nothing of."""
    bare = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)i?\s*", str(value), re.IGNORECASE)
    if bare is None or not float(bare[1]):
        return f"{value!r} is no size; write it as 24GB or 16GiB"
    kind = bare[2].upper() or "G"
    return f"{value!r} has no unit; write {bare[1]}{kind}iB, {bare[1]}{kind}B{'' if bare[2] else f', or {bare[1]}B of bytes'}"


def size_text(size: float) -> str:
    """Bytes as a person reads them (binary units)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def ranges(numbers: Iterable[int], between: str = ", ") -> str:
    """Numbers as people write them: 0-8, 11."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return between.join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
