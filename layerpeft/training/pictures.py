"""Which layers trained when: a picture of layers over optimizer steps, and a table of all switches."""

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpeft.integrations.drawing import new_figure, write_figure
from layerpeft.integrations.files import replace_file
from layerpeft.model.heads import HEAD, place_of
from layerpeft.training.report import LayerReport, Row, columns

_CHOSEN, _OTHER, _CHANGE, _INK = "#0072B2", "#C9CED3", "#D55E00", "#222222"  # Okabe-Ito, told apart in grey too
Plain = Mapping[str, Any]  # of a `Standing`


def spans(standing: Plain) -> Iterator[tuple[int, int, list[int], list[float | None] | None, int | None]]:
    """(first step, step after the last, active layers, scores that are known, bytes of the optimizer's states) of every window.

    Steps before the first choice are none of it.
    """
    history, scores = standing["history"], None
    for number, entry in enumerate(history):
        scores = entry["scores"] or scores
        end = history[number + 1]["step"] if number + 1 < len(history) else max(standing["step"], entry["step"])
        yield entry["step"], end, entry["layers"], scores, entry.get("optimizer_bytes")


def write_switches(standing: Plain, report: LayerReport, path: str | os.PathLike[str]) -> None:
    """`layers.csv` of a schedule: a row per switch and layer, and at the end one per layer with what it trained in all."""
    lines: list[tuple[Any, ...]] = [
        (start, layer, name, scores[layer] if scores else None, str(layer in active).lower(), None, None, used)
        for start, _, active, scores, used in spans(standing)
        for layer, name in enumerate(row.name for row in report.rows)
    ]
    lines += [(standing["step"], *_cells(row), None) for row in report.rows]
    _write_table(path, ("step", *columns(report.unit), "optimizer_bytes"), lines)


def write_heatmap(standing: Plain, report: LayerReport, path: str | os.PathLike[str]) -> bool:
    """Draws layer × step, the active windows filled, by their score where there is one; False where nothing can be drawn."""
    number = len(report.rows)
    figure = new_figure(9, max(2.4, min(12.0, 0.22 * number + 1.6)))
    if figure is None:
        return False
    found = list(spans(standing))
    steps = max(standing["step"], 1)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(max(number, 6), 2))
    first = found[0][0] if found else steps
    if first:  # before the first choice everything trains
        axes.axvspan(0, first, color="#d9d9d9", lw=0)
    top = max((s for _, _, _, scores, _ in found for s in scores or () if s is not None), default=None)
    for start, end, active, scores, _ in found:
        for layer in active:
            strength = 0.75 if not scores or not top else 0.25 + 0.75 * max(scores[layer] or 0.0, 0.0) / top
            axes.broken_barh(
                [(start, max(end - start, 0.0))], (layer - 0.45, 0.9), color=(0.12, 0.38, 0.65, strength), lw=0
            )
    axes.set(ylabel=report.unit, ylim=(-0.5, number - 0.5), xlim=(0, steps), title=report.why)
    axes.title.set_size(9)
    axes.set_yticks(range(0, number, max(1, number // 12)))
    points = [(start, len(active)) for start, _, active, _, _ in found]
    if points:
        below.step(*zip(*points, (steps, points[-1][1]), strict=True), where="post", color="#1f61a6")
    below.set(xlabel="optimizer step", ylabel="active", ylim=(0, number + 0.5))
    below.grid(alpha=0.3)
    return write_figure(figure, path)


def write_csv(rows: Iterable[Row], path: str | os.PathLike[str], unit: str = "layer") -> None:
    """Write layer,name,score,chosen,steps,change with a header; unknown values stay empty. Replaces the file whole."""
    _write_table(path, columns(unit), map(_cells, rows))


def _cells(row: Row) -> tuple[Any, ...]:
    return row.layer, row.name, row.score, str(row.chosen).lower(), row.steps, row.change


def _write_table(path: str | os.PathLike[str], columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *lines])  # nothing in the place of None
    replace_file(Path(path), text.getvalue().encode())


def write_png(rows: Iterable[Row], path: str | os.PathLike[str], title: str, unit: str = "layer") -> bool:
    """Draw scores (or a strip of the chosen layers) and any known changes; False when nothing could be drawn."""
    rows = sorted(rows, key=lambda row: row.layer)
    figure = (_grid if unit == HEAD else _figure)(rows, title, unit) if rows else None
    return figure is not None and write_figure(figure, path)


def _grid(rows: Sequence[Row], title: str, unit: str) -> Any:
    """A figure of layers × heads, darker by score, or where they were chosen; these are framed. None without matplotlib."""
    places = [place_of(row.name) or (row.name, 0) for row in rows]
    lines = list(dict.fromkeys(projection for projection, _ in places))
    wide = max(head for _, head in places) + 1
    figure = new_figure(max(4.0, min(12.0, 0.3 * wide + 2.5)), max(2.4, min(12.0, 0.22 * len(lines) + 1.8)))
    if figure is None:
        return None
    from matplotlib.patches import Rectangle

    scored = any(row.score is not None for row in rows)
    values = [[math.nan] * wide for _ in lines]
    axes = figure.subplots()
    for row, (projection, head) in zip(rows, places, strict=True):
        line = lines.index(projection)
        values[line][head] = (row.score or 0.0) if scored else float(row.chosen)
        if row.chosen:
            axes.add_patch(Rectangle((head - 0.5, line - 0.5), 1, 1, fill=False, ec=_CHANGE, lw=1.5))
    axes.imshow(values, origin="lower", aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set(xlabel=unit, ylabel="layer with heads")
    found = [row.score for row in rows if row.score is not None]
    shades = f", darker: higher score ({min(found):.3g} to {max(found):.3g})" if found else ""
    figure.suptitle(f"{title}; framed: chosen{shades}", fontsize=10, color=_INK, wrap=True)
    return figure


def _figure(rows: Sequence[Row], title: str, unit: str) -> Any:
    """A figure with one panel for scores or chosen layers and, when any is known, one for changes; None without matplotlib."""
    scored = any(row.score is not None for row in rows)
    changed = any(row.change is not None for row in rows)
    heights = [2.6 if scored else 0.5] + ([1.7] if changed else [])
    width = min(12.0, max(6.4, 2.0 + 0.115 * len(rows)))
    figure = new_figure(width, sum(heights) + 1.35 + 0.25 * changed)
    if figure is None:
        return None
    from matplotlib.patches import Patch

    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    layers = [row.layer for row in rows]
    colours = [_CHOSEN if row.chosen else _OTHER for row in rows]
    if scored:
        panels[0].bar(layers, [row.score or 0.0 for row in rows], color=colours, width=0.8)
        panels[0].set_ylabel("score", color=_INK)
    else:
        panels[0].bar(layers, [1.0] * len(rows), color=colours, width=0.9)
        panels[0].set_ylim(0, 1)
        panels[0].set_yticks([])
    if changed:
        panels[1].bar(layers, [100 * (row.change or 0.0) for row in rows], color=_CHANGE, width=0.8)
        panels[1].set_ylabel("weight change (%)", color=_INK)
    for panel in panels:  # every colour is said, so that a dark matplotlib style in the user's program changes nothing
        panel.set_facecolor("white")
        panel.tick_params(colors=_INK, labelsize=9)
        panel.spines[["left", "bottom"]].set_color("#888888")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].spines["left"].set_visible(scored)
    panels[-1].set_xlabel(unit, color=_INK)
    panels[-1].set_xlim(min(layers) - 0.7, max(layers) + 0.7)
    panels[-1].set_xticks(layers[:: 1 if len(rows) <= 24 else 5 if len(rows) <= 100 else 10])
    keys = [Patch(color=_CHOSEN, label="chosen"), Patch(color=_OTHER, label="not chosen")]
    figure.suptitle(title, fontsize=11, color=_INK, wrap=True)
    figure.legend(handles=keys, loc="outside lower right", ncols=2, frameon=False, fontsize=9, labelcolor=_INK)
    return figure
