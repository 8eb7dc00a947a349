"""Predictions for rows, however many: read, asked in batches of like length, and given back in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from layerpeft.errors import told
from layerpeft.recipe.reading import plain
from layerpeft.recipe.rows import Unfit
from layerpeft.text import counted, some
from layerpeft.using.incoming import Given, Incoming
from layerpeft.using.table import short, writing
from layerpeft.using.ways import Answer, Way


@dataclass
class Count:
    """What became of rows."""

    read: int = 0
    empty: int = 0  # answers without a word
    reasons: Counter[str] = field(default_factory=Counter)

    def told(self, cut: int, limit: int | None) -> str:
        """One line."""
        without = sum(self.reasons.values())
        found = f"{counted(self.read, 'row')} read, {self.read - without} predicted"
        named = [f"{n} {reason}" for reason, n in self.reasons.most_common()]
        found += f", {without} without a prediction ({some(named, 4, ' and {} other reasons')})" if without else ""
        found += f"; {self.empty} of the answers {'is' if self.empty == 1 else 'are'} empty" if self.empty else ""
        return found + (f"; {cut} cut at {limit} tokens" if cut else "")


def answers(rows: Incoming, way: Way, batch: int) -> Iterator[tuple[Given, Answer | None, str]]:
    """Each row with its answer, or why it has none, in their order; in memory are those of a window of batches."""
    left = iter(rows)
    while window := list(islice(left, batch * way.ahead)):
        found: list[Answer | None] = [None] * len(window)
        why = [given.reason for given in window]
        items: dict[int, Any] = {}
        for i, given in enumerate(window):
            try:
                if not given.reason:
                    items[i] = way.item(rows.cells(given))
            except Unfit as error:
                why[i] = told(error)
        order = sorted(items, key=lambda i: way.size(items[i]), reverse=True)
        for begin in range(0, len(order), batch):
            part = order[begin : begin + batch]
            for i, answer in zip(part, way.run([items[i] for i in part]), strict=True):
                found[i] = answer
        yield from zip(window, found, why, strict=True)


def predict(rows: Incoming, way: Way, out: Path, batch: int, keep: Sequence[str] = ()) -> Count:
    """Writes a row for every row: its number, the columns that are kept, the answer, and the reason where there is none.

    A column that is kept and has the name of one of the answer's is written as `kept_…`."""
    own = {"row": "count", **way.columns(), "reason": "text"}
    names = {name: f"kept_{name}" if name in own else name for name in keep}
    columns = {"row": "count", **dict.fromkeys(names.values(), "object"), **way.columns(), "reason": "text"}
    texts = [name for name, kind in way.columns().items() if kind == "text"]
    count = Count()
    with writing(out, columns) as write:
        held: list[dict[str, Any]] = []
        for given, answer, why in answers(rows, way, batch):
            count.read += 1
            if answer is None:
                count.reasons[why] += 1
            elif texts and not any(str(answer[name]).strip() for name in texts):
                count.empty += 1
            kept_of = {new: plain(given.row.get(name)) for name, new in names.items()}
            held.append({"row": given.number, **kept_of, **short(answer or {}), "reason": why or None})
            if len(held) >= batch * way.ahead:
                write(held)
                held = []
        write(held)
    return count
