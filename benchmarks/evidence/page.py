"""The page of the docs: its tables, from the figures that stand in benchmarks/evidence/results/tables.json.

A table stands between `<!-- evidence: TABLE ROWS VALUES [COLUMN=VALUE …] -->` and `<!-- end -->`: a line for everything that column
ROWS names. With one of VALUES a column for every cell, and for the mean over all; with several, a column for each. A filter may be
`COLUMN~PATTERN`; names with spaces are written with `_`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.found import Found
from benchmarks.evidence.store import by_rows
from benchmarks.evidence.tables import OVER, TABLES, plain, text_of
from benchmarks.table import markdown
from layerpeft.errors import ConfigError, unknown

ROOT = Path(__file__).parents[2]
FIGURES = Path(__file__).parent / "results" / "tables.json"
PAGE = ROOT / "docs" / "evidence.md"
BLOCK = re.compile(r"(<!-- evidence: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Rows = Sequence[Mapping[str, Any]]


def write(founds: Sequence[Found], figures: Path = FIGURES, page: Path = PAGE) -> Path:
    """Writes the figures of all tables, and fills the tables of the page by them."""
    known = {name: plain(name, founds) for name in TABLES}
    text = filled(page.read_text(encoding="utf-8"), known)
    figures.write_text(by_rows(known), encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    return page


def filled(text: str, figures: Mapping[str, Rows]) -> str:
    """A page with its tables made anew. Raises: ConfigError for a table, a column or a value that is not there."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{_table(found[2], figures)}\n\n{found[4]}", text)


def _table(asked: str, figures: Mapping[str, Rows]) -> str:
    name, index, values, *filters = (word.replace("_", " ") for word in asked.split())
    if name not in figures:
        raise ConfigError(unknown("table", name, figures))
    rows = [row for row in figures[name] if all(_holds(row, one) for one in filters)]
    if not rows:
        raise ConfigError(f"{asked}: no row of table {name} is like that")
    wanted = values.split(",")
    if wrong := [unknown("column", column, rows[0]) for column in [index, *wanted] if column not in rows[0]]:
        raise ConfigError(*wrong)
    if len(wanted) > 1:
        return markdown([index, *wanted], [[text_of(row[column]) for column in (index, *wanted)] for row in rows])
    return _by_cell(rows, index, wanted[0])


def _holds(row: Mapping[str, Any], one: str) -> bool:
    """Whether a row is as `COLUMN=VALUE` or `COLUMN~PATTERN` says."""
    column, sign, value = re.split(r"([=~])", one, maxsplit=1)
    known = str(row.get(column, ""))
    return known == value if sign == "=" else re.search(value, known) is not None


def _by_cell(rows: Rows, index: str, value: str) -> str:
    """A column for every cell; the lines in the order of those over all cells, where there are any."""
    known = {(row[index], row["cell"]): row[value] for row in rows if row[value] is not None}
    columns = list(dict.fromkeys(row["cell"] for row in rows))
    columns.sort(key=lambda cell: cell.startswith(OVER))
    names = dict.fromkeys(row[index] for row in sorted(rows, key=lambda row: not row["cell"].startswith(OVER)))
    lines = [[name, *(text_of(known.get((name, cell))) for cell in columns)] for name in names]
    return markdown([index, *columns], lines)
