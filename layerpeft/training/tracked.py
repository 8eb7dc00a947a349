"""What trackers are shown when a training ends: every layer as a table, and its picture, which of a schedule is the map."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from layerpeft.integrations.trackers import Shown
from layerpeft.saving.manifest import PICTURES
from layerpeft.training.follower import Follower
from layerpeft.training.record import Table
from layerpeft.training.report import columns, layer_report


@contextmanager
def shown(followers: list[Follower]) -> Iterator[list[Shown]]:
    """A table for each adapter whose layers are chosen; pictures lie in a folder that goes at the end."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, follower in enumerate(f for f in followers if f.record.selection is not None):
            place = Path(folder, str(number))
            place.mkdir()
            found.append(_of(follower.model, follower, place))
        yield found


def _of(model: nn.Module, follower: Follower, folder: Path) -> Shown:
    report = layer_report(model, follower.adapter)
    (follower.record.schedule or Table()).save(str(folder), report)
    name = "layers" if follower.adapter == "default" else f"layers/{follower.adapter}"
    picture = folder / PICTURES[1]
    rows = [(r.layer, r.name, r.score, r.chosen, r.steps, r.change) for r in report.rows]
    return Shown(name, columns(report.unit), rows, picture if picture.is_file() else None)
