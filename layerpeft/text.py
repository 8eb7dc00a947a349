"""What layerpeft tells a person while it works: to standard error, from the first process, without tearing progress bars."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence

from tqdm.auto import tqdm

logger = logging.getLogger("layerpeft")

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(?:(?:([KMGT])(I?))?B)?\s*", re.IGNORECASE)


def note(message: str) -> None:
    """Prints one line, and logs it at INFO. Silent in all but the first process, and with LAYERPEFT_QUIET=1."""
    logger.info(message)
    if os.environ.get("RANK", "0") == "0" and os.environ.get("LAYERPEFT_QUIET") != "1":
        tqdm.write(f"[layerpeft] {message}", file=sys.stderr)


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


def size_of(text: str) -> int | None:
    """Bytes in a text such as "6GB" (powers of 1000), "6GiB" (of 1024) or "512"; None where it is no size."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index((found[2] or " ").upper()))


def size_text(size: float) -> str:
    """Bytes as a person reads them (binary units)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
