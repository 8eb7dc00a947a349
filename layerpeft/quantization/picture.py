"""A picture of the bits: layers across, their linears down, and the precision of each as a colour."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

from layerpeft.integrations.drawing import new_figure, write_figure
from layerpeft.model.precisions import PRECISIONS

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# few bits are dark; what is kept is nearly white
COLOURS = {
    "hqq1": "#08204a", "hqq2": "#0b3c7d", "hqq3": "#1f61a6", "hqq4": "#4b92c9", "fp4": "#6aaed6", "nf4": "#86bcdc",
    "int8": "#c3dbee", "16bit": "#f3f3f3",
}  # fmt: skip


class Bits(Protocol):
    """What is drawn: linears with their precision (`name`, `got`), and the mean over their weights."""

    @property
    def rows(self) -> Sequence[Any]: ...

    @property
    def mean_bits(self) -> float: ...


def cells(found: Bits) -> tuple[list[str], dict[tuple[str, int], str]]:
    """The kinds of linears, in the order of the model, and the precision of each in each layer; others go without."""
    placed = [(m, row) for row in found.rows if (m := NUMBER.search(row.name))]
    stacks = {row.name[: m.start()] for m, row in placed}
    kinds: dict[str, None] = {}
    table: dict[tuple[str, int], str] = {}
    for match, row in placed:
        kind = row.name[match.end() + 1 :]
        kind = kind if len(stacks) == 1 else f"{row.name[: match.start()]}…{kind}"
        kinds[kind] = None
        table[kind, int(match[0])] = row.got
    return list(kinds), table


def write_bits(found: Bits, path: str | os.PathLike[str]) -> bool:
    """Draws it; False where there is no matplotlib, or nothing to draw."""
    kinds, table = cells(found)
    if not table:
        return False
    layers = max(layer for _, layer in table) + 1
    figure = new_figure(max(5.0, min(14.0, 0.28 * layers + 3.2)), 0.3 * len(kinds) + 1.7)
    if figure is None:
        return False
    from matplotlib.patches import Patch

    axes = figure.subplots()
    for (kind, layer), precision in table.items():
        row = len(kinds) - 1 - kinds.index(kind)
        axes.broken_barh([(layer - 0.5, 1.0)], (row - 0.5, 1.0), color=COLOURS[precision], ec="#ffffff", lw=0.8)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(-0.5, len(kinds) - 0.5), xlabel="layer")
    axes.set_title(f"precision by layer: {found.mean_bits:.2f} bits a weight, scales included", size=9)
    axes.set_yticks(range(len(kinds)), list(reversed(kinds)), size=8)
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    used = [name for name in PRECISIONS if name in set(table.values())]
    patches = [Patch(fc=COLOURS[name], ec="#999999", label=name) for name in used]
    axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return write_figure(figure, path)
