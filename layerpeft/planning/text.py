"""A plan, a fit and a measurement as text."""

from __future__ import annotations

from typing import Any

from layerpeft.text import grid, size_text


def plan_lines(found: Any) -> list[str]:
    """The lines of a Plan: layers, parts with and without checkpointing, the cut, operations, what is assumed."""
    rows = [
        (str(r.layer), r.name, "yes" if r.trains else "no", f"{r.trainable:,}", size_text(r.weight_bytes))
        for r in found.rows
    ]
    elsewhere = found.trainable - sum(row.trainable for row in found.rows)
    if rows and elsewhere:
        rest = found.weights - sum(row.weight_bytes for row in found.rows)
        rows.append(("", "outside of these", "yes", f"{elsewhere:,}", size_text(rest)))
    widths = (5, max([28, *(len(row.name) for row in found.rows)]), 6, 12, 10)
    lines = grid([("layer", "name", "trains", "trainable", "weights"), *rows], "><<>", widths) if rows else []
    lines.append(f"trainable: {found.trainable:,} of {found.total:,} ({100 * found.trainable / found.total:.2f} %)")
    lines += _parts(found)
    where = "the bottom" if found.stop.layer is None else f"layer {found.stop.layer}"
    lines.append(f"backward pass: down to {where} ({found.stop.why})")
    return lines + [f"assumed: {text}" for text in found.assumed]


def _parts(found: Any) -> list[str]:
    """The table of bytes and operations; the column that applies is marked."""
    columns = [("without checkpointing", found.kept, found.everything[0], not found.checkpointing)]
    if found.recomputed is not None:
        columns.append(("with checkpointing", found.recomputed, found.everything[1], found.checkpointing))
    heads = [f"{title} *" if applies else title for title, _, _, applies in columns]
    fixed = {"weights": found.weights, "gradients": found.gradients, f"optimizer, {found.optimizer}": found.states}
    table = [("", *heads)]
    table += [(name, *[size_text(size)] * len(columns)) for name, size in fixed.items()]
    table.append(("activations", *[size_text(one.peak) for _, one, _, _ in columns]))
    table.append(("together", *[size_text(sum(fixed.values()) + one.peak) for _, one, _, _ in columns]))
    table.append(("operations of a pass", *[f"{one.flops:.3g}" for _, one, _, _ in columns]))
    table.append(("  of training everything", *[f"{one.flops / full:.2f}" for _, one, full, _ in columns]))
    return grid(table, "<>") + ["* applies here"]
