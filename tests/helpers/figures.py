"""Figures of a page, tied to the results that they come from: what a page says is made again out of the result and looked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def result(name: str, folder: Path = RESULTS) -> Any:
    """A result that is checked in."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def section(page: str, heading: str, until: str = "\n## ") -> str:
    """What stands below a heading (or any other words) of a page, up to the next heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(_words(heading).finditer(text))
    assert len(found) == 1, f"{page} has {heading!r} {len(found)} times"
    rest = text[found[0].end() :]
    end = rest.find(until) if "\n" in until else next((m.start() for m in _words(until).finditer(rest)), -1)
    return rest if end < 0 else rest[:end]


def _words(text: str) -> re.Pattern[str]:
    """The same words, wherever lines are broken."""
    return re.compile(r"\s+".join(map(re.escape, text.split())))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As a page writes it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  |", " |") for line in lines).replace("| --- ", "|---") + "\n"


def span(numbers: Iterable[Any], form: str = "{:,}", nothing: str = "–") -> str:
    """One number, or the least and the highest of several, as a page writes them."""
    known = sorted({n for n in numbers if n is not None})
    return " to ".join(dict.fromkeys(form.format(n) for n in (known[0], known[-1]))) if known else nothing


def untied(text: str, made: Iterable[str], said: Iterable[str] = ()) -> list[str]:
    """What is wrong with a text: pieces `made` of results, or `said` of how they were got, that it lacks; and numbers in no such
    piece. Blocks of code, which tests of pages run, and addresses are left out."""
    rest, lost = _flat(text), []
    for piece in sorted(map(_flat, {*made, *said}), key=len, reverse=True):
        if piece not in rest:
            lost.append(f"not there: {piece}")
        rest = rest.replace(piece, "…")
    return lost + [
        f"from no result: {rest[max(0, m.start() - 30) : m.end() + 30]}"
        for m in re.finditer(r"(?<![A-Za-z\d])\d[\d.,]*", rest)
    ]


def _flat(text: str) -> str:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).replace("**", "").split())
