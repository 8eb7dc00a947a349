"""What a run with `prefix_cache` left: its cache, and whether its model is another one's to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerpeft.training.prefix.entries import SIZE, entry_of
from tests.helpers.killing import differing
from tests.helpers.loops import record


def cache_of(model: Any) -> Any:
    return record(model).prefix


def equal(a: Any, b: Any) -> bool:
    """Whether two models hold the same bits under the same names."""
    return not differing(a.state_dict(), b.state_dict())


def states_in(root: Path) -> dict[tuple[str, bytes], bytes]:
    """All states below a folder: the folder of their base and cut and the key of their row, and their bytes."""
    found = {}
    for journal in root.glob("*/*.journal"):
        data = journal.with_suffix(".data").read_bytes()
        records = journal.read_bytes()
        for entry in filter(None, (entry_of(records[i : i + SIZE]) for i in range(0, len(records), SIZE))):
            key = journal.parent.name, entry.key
            assert key not in found, "a row is kept twice"
            found[key] = data[entry.offset : entry.offset + entry.length]
    return found
