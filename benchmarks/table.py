"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerpeft.text import size_text

# count -> heading, in the order of the columns
COLUMNS = {
    "trainable": "trains",
    "flops": "operations",
    "kept_bytes": "kept for backward",
    "peak_bytes": "peak live",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "together_bytes": "together",
}


def arms(rows: Mapping[str, Any], reference: str) -> str:
    """One line per arm; operations and times as ratios to the reference."""
    counted = [row["counts"] for row in rows.values() if "counts" in row]
    columns = [key for key in COLUMNS if any(key in counts for counts in counted)]
    peaks = any("accelerator_peak_bytes" in row for row in rows.values())
    timed = any("time" in row for row in rows.values())
    head = ["arm", *(COLUMNS[key] for key in columns)]
    head += ["allocator's peak"] * peaks + ["step time"] * timed
    lines = []
    for label, row in rows.items():
        if "skipped" in row:
            lines.append([f"`{label}`", row["skipped"], *[""] * (len(head) - 2)])
            continue
        line = [f"`{label}`"]
        line += [count_text(key, row["counts"], rows[reference].get("counts", {})) for key in columns]
        if peaks:
            line.append(size_text(row["accelerator_peak_bytes"]) if "accelerator_peak_bytes" in row else "")
        if timed:
            line.append("1" if label == reference else time_text(row))
        lines.append(line)
    return markdown(head, lines)


def legend(rows: Mapping[str, Any]) -> str:
    """What each arm is."""
    lines = []
    for label, row in rows.items():
        options = ", ".join(f"{key} {value}" for key, value in row["options"].items())
        lines.append(f"- `{label}`: {row['about']}" + (f" ({options})" if options else ""))
    return "\n".join(lines)


def count_text(key: str, counts: Mapping[str, int], unit: Mapping[str, int]) -> str:
    """One count as a person reads it."""
    if key not in counts:
        return ""
    value = counts[key]
    if key == "trainable":
        return number_text(value)
    if key == "flops":
        return f"{value / unit['flops']:.3f}" if unit.get("flops") else f"{value:.3g}"
    return size_text(value)


def number_text(value: float) -> str:
    """A count of things: 175.1 k, 6.74 G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def time_text(row: Mapping[str, Any]) -> str:
    """Median and quartiles, and what a refresh adds."""
    if "time" not in row:
        return ""
    text = ratio_text(row["time"])
    if "mean_over_usual_step" in row:
        text += f"; {row['time']['median'] * row['mean_over_usual_step']:.2f} with refreshes"
    return text


def ratio_text(found: Mapping[str, float]) -> str:
    """Median and quartiles."""
    return f"{found['median']:.3f} ({found['lower']:.3f}–{found['upper']:.3f})"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
