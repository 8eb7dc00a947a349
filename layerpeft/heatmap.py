"""Which layers trained when: a picture of layers over optimizer steps, and a table of all switches."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpeft.report import COLUMNS, Row, replace_file, warn_no_matplotlib

SWITCHES = ("step", *COLUMNS, "optimizer_bytes")
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


def write_switches(standing: Plain, names: Sequence[str], rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """`layers.csv` of a schedule: a row per switch and layer, and at the end one per layer with what it trained in all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SWITCHES)
    lines: list[tuple[Any, ...]] = []
    for start, _, active, scores, used in spans(standing):
        for layer, name in enumerate(names):
            score = scores[layer] if scores else None
            lines.append((start, layer, name, score, str(layer in active).lower(), None, None, used))
    for row in rows:
        chosen = str(row.chosen).lower()
        lines.append((standing["step"], row.layer, row.name, row.score, chosen, row.steps, row.change, None))
    writer.writerows(["" if cell is None else cell for cell in line] for line in lines)
    replace_file(Path(path), text.getvalue().encode())


def write_heatmap(standing: Plain, names: Sequence[str], path: str | os.PathLike[str], title: str) -> bool:
    """Draws layer × step, the active windows filled, by their score where there is one; False where nothing can be drawn."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        warn_no_matplotlib()
        return False
    found = list(spans(standing))
    steps = max(standing["step"], 1)
    figure = Figure(figsize=(9, max(2.4, min(12.0, 0.22 * len(names) + 1.6))), layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(max(len(names), 6), 2))
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
    axes.set(ylabel="layer", ylim=(-0.5, len(names) - 0.5), xlim=(0, steps), title=title)
    axes.title.set_size(9)
    axes.set_yticks(range(0, len(names), max(1, len(names) // 12)))
    points = [(start, len(active)) for start, _, active, _, _ in found]
    if points:
        below.step(*zip(*points, (steps, points[-1][1]), strict=True), where="post", color="#1f61a6")
    below.set(xlabel="optimizer step", ylabel="active", ylim=(0, len(names) + 0.5))
    below.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, facecolor="white", metadata={"Software": None})
    replace_file(Path(path), picture.getvalue())
    return True
