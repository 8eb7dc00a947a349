"""Results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, QUIET, OURS = "#22303c", "#9aa7b2", "#c8553d"
PARTS = {"weights": "#d5dbe0", "optimizer": "#8fa3b3", "gradients": "#e0b15c", "activations": "#5b7c99"}
LINES = ("#c8553d", "#3b6ea5", "#5a9367", "#8a6fae", "#b08b2e")
GIB = 2**30


def arms(rows: Mapping[str, Any], reference: str, title: str, path: Path) -> Path:
    """Bars: operations, bytes by part, and step time where it was measured."""
    shown = {label: row for label, row in rows.items() if "counts" in row}
    timed = any("time" in row for row in shown.values())
    parts = all("together_bytes" in row["counts"] for row in shown.values())
    count = 2 + timed
    figure, axes = new_figure(1, count, (4.1 * count, 0.42 * len(shown) + 1.9))
    unit = shown[reference]["counts"]["flops"]
    _bars(
        axes[0],
        shown,
        {k: r["counts"]["flops"] / unit for k, r in shown.items()},
        f"operations of a step, {reference} = 1",
    )
    if parts:
        _stack(axes[1], shown)
    else:
        values = {k: r["counts"]["peak_bytes"] / 2**20 for k, r in shown.items()}
        _bars(axes[1], shown, values, "peak live, MiB")
    if timed:
        _times(axes[2], shown, reference)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return save(figure, path)


def lines(sweeps: Mapping[str, Any], title: str, path: Path) -> Path:
    """One column per thing that grows, one line per arm: operations above, peak live bytes below."""
    figure, axes = new_figure(2, len(sweeps), (3.5 * len(sweeps), 6.2))
    for column, sweep in enumerate(sweeps.values()):
        xs = [point["value"] for point in sweep["points"]]
        for row, (key, scale, what) in enumerate(
            (("flops", 1e12, "10¹² operations"), ("peak_bytes", GIB, "peak live, GiB"))
        ):
            axis = axes[row][column]
            for index, label in enumerate(sweep["points"][0]["arms"]):
                ys = [point["arms"][label][key] / scale for point in sweep["points"]]
                axis.plot(
                    xs, ys, marker="o", markersize=3.5, linewidth=1.6, color=LINES[index % len(LINES)], label=label
                )
            axis.set_ylim(bottom=0)
            if sweep.get("doubling"):
                axis.set_xscale("log", base=2)
            axis.set_xticks(xs, [f"{x:g}" for x in xs])
            axis.grid(axis="y", color="#e6eaed", linewidth=0.8)
            if column == 0:
                axis.set_ylabel(what, color=INK)
            if row == 1:
                axis.set_xlabel(sweep["axis"], color=INK)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return save(figure, path)


def curves(
    found: Mapping[str, tuple[Sequence[float], Sequence[float]]], words: tuple[str, str], title: str, path: Path
) -> Path:
    """One line per arm, from xs and ys; `words` name the axes."""
    figure, axes = new_figure(1, 1, (7.2, 3.8))
    for index, (label, (xs, ys)) in enumerate(found.items()):
        colour = LINES[index % len(LINES)]
        axes[0].plot(xs, ys, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=label)
    axes[0].grid(axis="y", color="#e6eaed", linewidth=0.8)
    axes[0].set_xlabel(words[0], color=INK)
    axes[0].set_ylabel(words[1], color=INK)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return save(figure, path)


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(QUIET)
        axis.tick_params(colors=INK, labelsize=9)
    return figure, axes if rows > 1 else axes[0]


def _bars(axis: Any, rows: Mapping[str, Any], values: Mapping[str, float], title: str) -> None:
    places = range(len(rows))
    colours = [OURS if row["arm"].startswith("layerpeft") else QUIET for row in rows.values()]
    axis.barh(places, list(values.values()), color=colours, height=0.62)
    for place, value in zip(places, values.values(), strict=True):
        axis.text(value, place, f" {value:.3g}", va="center", fontsize=8.5, color=INK)
    _names(axis, rows, title, max(values.values()))


def _times(axis: Any, rows: Mapping[str, Any], reference: str) -> None:
    timed = [row.get("time") or {"median": 0, "lower": 0, "upper": 0} for row in rows.values()]
    values = {label: row["median"] for label, row in zip(rows, timed, strict=True)}
    _bars(axis, rows, values, f"time of a step, {reference} = 1 (median, quartiles)")
    low = [row["median"] - row["lower"] for row in timed]
    high = [row["upper"] - row["median"] for row in timed]
    axis.set_xlim(0, 1.22 * max(row["upper"] for row in timed))
    axis.errorbar(
        list(values.values()), range(len(rows)), xerr=[low, high], fmt="none", ecolor=INK, elinewidth=1, capsize=2.5
    )
    _apart(axis, values, [row["upper"] for row in timed])


def _apart(axis: Any, values: Mapping[str, float], ends: Sequence[float]) -> None:
    """Moves the numbers to the right of the whiskers."""
    for text, end in zip(axis.texts, ends, strict=True):
        text.set_x(max(end, text.get_position()[0]))


def _stack(axis: Any, rows: Mapping[str, Any]) -> None:
    most = max(row["counts"]["together_bytes"] for row in rows.values())
    scale, unit = (GIB, "GiB") if most >= 4 * GIB else (2**20, "MiB")
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        sizes = [_part(row["counts"], part) / scale for row in rows.values()]
        axis.barh(range(len(rows)), sizes, left=left, color=colour, height=0.62, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axis.text(total, place, f" {total:.4g}", va="center", fontsize=8.5, color=INK)
    _names(axis, rows, f"bytes at the peak, {unit}", max(left))
    axis.legend(
        fontsize=7.5, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), columnspacing=1.0
    )


def _part(counts: Mapping[str, int], part: str) -> int:
    if part == "activations":
        return counts["peak_bytes"] - counts["gradient_bytes"]
    return counts[{"weights": "weight_bytes", "optimizer": "optimizer_bytes", "gradients": "gradient_bytes"}[part]]


def _names(axis: Any, rows: Mapping[str, Any], title: str, most: float) -> None:
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlim(0, most * 1.22)
    axis.set_title(title, fontsize=9, color=INK, loc="left")


def save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
    return path
