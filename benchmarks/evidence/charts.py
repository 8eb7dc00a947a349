"""The tables as pictures: what layers bring, which criteria tell it, what choices lack, and what they need for the loss of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chart import INK, LINES, OURS, QUIET, new_figure, save
from benchmarks.evidence import tables
from benchmarks.evidence.found import Found

SHOWN = 16  # choices of a budget


def layers(founds: Sequence[Found], path: Path) -> Path:
    """A panel for every cell: what layers gain alone as bars, what they add to sets as a line."""
    rows = [row for row in tables.oracle(founds) if row[1].isdigit()]
    figure, axes = _panels(len(founds), (3.4, 2.9))
    for axis, found in zip(axes, founds, strict=False):
        own = [row for row in rows if row[0] == found.name]
        _bars_of_layers(axis, own)
        axis.set_title(found.name, fontsize=10, color=INK)
        axis.set_xlabel("layer", color=INK)
        axis.set_xticks(range(0, found.count, 2))
    axes[0].set_ylabel("fall of the held-out loss", color=INK)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("What a layer brings", fontsize=11, color=INK, x=0.01, ha="left")
    return save(figure, path)


def _panels(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure with so many axes, three in a line; `size`: width and height of one."""
    columns = max(1, min(count, 3))
    lines = -(-max(1, count) // columns)
    figure, _ = new_figure(lines, columns, (max(7.0, size[0] * columns), size[1] * lines + 0.4))
    axes = list(figure.axes)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes


def _bars_of_layers(axis: Any, rows: Sequence[tables.Row]) -> None:
    for at, colour, kind in ((2, QUIET, "alone"), (3, OURS, "in a set of a quarter, beside the mean")):
        known = [(int(row[1]), row[at]) for row in rows if row[at] is not None]
        if not known:
            continue
        xs, means = [x for x, _ in known], [span[0] for _, span in known]
        if at == 2:
            axis.bar(xs, means, color=colour, label=kind)
        else:
            axis.plot(xs, means, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=kind)
        axis.errorbar(xs, means, yerr=_whiskers([s for _, s in known]), fmt="none", ecolor=INK, elinewidth=0.8)
    axis.axhline(0, color=QUIET, linewidth=0.8)


def criteria(founds: Sequence[Found], path: Path) -> Path:
    """Rank correlations over all cells: alone and in sets, a line for every criterion."""
    rows = tables.overall(tables.criteria(founds))
    series = {
        "with what layers gain alone": [row[2] for row in rows],
        "with what they add to sets": [r[3] for r in rows],
    }
    title = "Rank correlation of criteria with what layers bring"
    return _points([row[1] for row in rows], series, title, path)


def regret(founds: Sequence[Found], path: Path) -> Path:
    """What choices lack of the best known gain at equal time, over all cells that were compared."""
    rows = tables.overall([row for row in tables.regret(founds) if row[1] == "time"])[:SHOWN]
    title = "At equal time: what a choice lacks of the best known, in parts of what all layers gain"
    return _points([row[2] for row in rows], {"": [row[5] for row in rows]}, title, path)


def _points(names: Sequence[str], series: Mapping[str, Sequence[Any]], title: str, path: Path) -> Path:
    figure, (axis,) = new_figure(1, 1, (8.4, 0.27 * len(names) + 1.4))
    for index, (label, spans) in enumerate(series.items()):
        ys = [place + 0.18 * (2 * index - len(series) + 1) for place in range(len(names))]
        means = [span[0] for span in spans]
        colour = LINES[index]
        axis.errorbar(
            means, ys, xerr=_whiskers(spans), fmt="o", color=colour, markersize=4, elinewidth=1.2, label=label or None
        )
    axis.set_yticks(range(len(names)), names)
    for text, name in zip(axis.get_yticklabels(), names, strict=True):
        text.set_color(OURS if "(ours)" in name or "time:" in name else INK)
    axis.invert_yaxis()
    axis.axvline(0, color=QUIET, linewidth=0.8)
    axis.grid(axis="x", color="#e6eaed", linewidth=0.8)
    if len(series) > 1:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return save(figure, path)


def _whiskers(spans: Sequence[Any]) -> list[list[float]]:
    """How far intervals reach to both sides of their means; not at all where there is none."""
    low, high = ([abs(span[at] - span[0]) for span in spans] for at in (1, 2))
    return [[0.0 if value != value else value for value in side] for side in (low, high)]


def matched(founds: Sequence[Found], path: Path) -> Path:
    """A panel for every cell: held-out loss against operations with states kept, a line for every choice."""
    by_cell = {found.name: [row[1] for row in tables.matched([found])] for found in founds}
    asked = [found for found in founds if by_cell[found.name]]
    figure, axes = _panels(len(asked), (4.3, 4.2))
    for axis, found in zip(axes, asked, strict=False):
        seeds = found.design.matched.seeds
        axis.axhline(tables.wanted(found, seeds), color=INK, linewidth=0.9, linestyle="--", label="all layers")
        for index, name in enumerate(by_cell[found.name]):
            xs, ys = tables.curve(found, name, True, seeds)
            axis.plot(xs, ys, marker="o", markersize=3.5, linewidth=1.6, color=LINES[index % len(LINES)], label=name)
        axis.set_title(found.name, fontsize=10, color=INK)
        axis.set_xlabel("operations, all layers = 1", color=INK)
        axis.grid(axis="y", color="#e6eaed", linewidth=0.8)
    axes[0].set_ylabel("held-out loss", color=INK)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
    )
    figure.suptitle(
        "Loss by operations, with states kept below the lowest layer that trains", fontsize=11, x=0.01, ha="left"
    )
    return save(figure, path)


CHARTS: Mapping[str, Callable[[Sequence[Found], Path], Path]] = {
    "layers": layers, "criteria": criteria, "regret": regret, "matched": matched,
}  # fmt: skip
