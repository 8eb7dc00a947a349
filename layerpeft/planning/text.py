"""A plan, a fit and a measurement as text."""

from __future__ import annotations

from typing import Any

from layerpeft.text import grid, size_text


def plan_lines(found: Any) -> list[str]:
    """The lines of a Plan: layers, parts with and without checkpointing, the cut, operations, what is assumed."""
    rows = [(str(r.layer), r.name, _trains(r), f"{r.trainable:,}", size_text(r.weight_bytes)) for r in found.rows]
    elsewhere = found.trainable - sum(row.trainable for row in found.rows)
    if rows and elsewhere:
        rest = found.weights - sum(row.weight_bytes for row in found.rows)
        rows.append(("", "outside of these", "yes", f"{elsewhere:,}", size_text(rest)))
    widths = (5, max([28, *(len(row.name) for row in found.rows)]), max([6, *(len(row[2]) for row in rows)]), 12, 10)
    lines = grid([("layer", "name", "trains", "trainable", "weights"), *rows], "><<>", widths) if rows else []
    lines.append(f"trainable: {found.trainable:,} of {found.total:,} ({100 * found.trainable / found.total:.2f} %)")
    lines += _parts(found)
    lines += [f"beside the model: {line}" for line in found.beside.lines]
    where = "the bottom" if found.stop.layer is None else f"layer {found.stop.layer}"
    lines.append(f"backward pass: down to {where} ({found.stop.why})")
    lines += prefix_lines(found.prefix) if found.prefix is not None and found.prefix.setting is not None else []
    lines += [f"assumed: {text}" for text in found.assumed]
    return lines if found.share is None else [*lines, "", *share_lines(found.share)]


def prefix_lines(found: Any) -> list[str]:
    """The lines of a Prefix that was asked for."""
    if found.why is not None:
        return [f"prefix_cache: {'off' if found.known else 'not known yet'}, {found.why}"]
    return [
        f"prefix_cache: later epochs begin at layer {found.layer}, and {size_text(found.token)} are kept of a token",
        f"operations of a step: {found.whole:.3g} in the first epoch, as without it, {found.later:.3g} in later ones "
        f"({found.later / found.whole:.2f})",
        *apart_lines(found),
    ]


def apart_lines(found: Any) -> list[str]:
    """What a Prefix takes where nothing below the cut is loaded."""
    if found.apart is None:
        return []
    training, filling = size_text(found.apart.training), size_text(found.apart.filling)
    return [
        f"nothing below layer {found.layer} need be loaded: training what lies above takes {training} together, and "
        f"layerpeft prefill before it {filling}"
    ]


LITTLE = 0.9  # of all operations: what spares less is not worth a line to those who have not asked


def rows_lines(found: Any, rows: Any) -> list[str]:
    """What a Prefix comes to for these Rows; for one that was not asked for, where that is much."""
    if found.why is not None:
        return []
    about, share, size = "about " * rows.about, rows.ratio(found), size_text(rows.takes(found))
    epochs = f"{rows.epochs:.3g} epochs"
    if found.setting is None:
        said = f"prefix_cache: memory would take {about}{size}, and {epochs} then {share:.2f} of their operations"
        return [f"{said}: later ones begin at layer {found.layer}"] if rows.epochs > 1 and share < LITTLE else []
    among = ", those of held-out rows among them" * (rows.held_out > 0)
    lines = [f"prefix_cache: the states of {about}{rows.tokens + rows.held_out:,} tokens take {size}{among}"]
    if rows.epochs <= 1:
        but = ", but for held-out rows, which are measured more than once" if rows.held_out else ""
        return [*lines, f"no more than one epoch: no row comes again, and prefix_cache spares nothing{but}"]
    if rows.found(found) < 1:
        begun = f"{100 * rows.found(found):.0f} % of later batches of {rows.batch} rows begin there"
        lines.append(f"within the limit of {size_text(found.setting.limit)} {begun}: those of which every row is kept")
    return [*lines, f"{epochs} take {share:.2f} of the operations that they take without it"]


def _trains(row: Any) -> str:
    return "{} of {}".format(*row.units) if row.units else "yes" if row.trains else "no"


def share_lines(found: Any) -> list[str]:
    """The lines of a Share: a card's bytes by part, and what passes between the cards in a step."""
    names = {
        "weights": "weights, its part", "masters": "float32 copies", "gradients": "gradients", "states": "optimizer",
        "activations": "activations", "gathered": "whole weights at once", "buffers": "buffers of collectives",
    }  # fmt: skip
    rows = [(names[name], size_text(size)) for name, size in found.parts.items() if size or name == "weights"]
    lines = grid(
        [(f"one of {found.processes} cards, {found.engine}", ""), *rows, ("together", size_text(found.together))], "<>"
    )
    moved = found.traffic
    steps = [
        ("gathered, forward pass", moved.forward),
        ("gathered, backward pass", moved.backward),
        ("gradients", moved.reduced),
    ]
    table = [(name, f"{one.times:,}", size_text(one.bytes)) for name, one in steps]
    table += [("weights after the step", "", size_text(moved.updated))] if moved.updated else []
    table.append(("a card receives", "", size_text(moved.received)))
    lines += ["", *grid([("traffic of a step", "times", "bytes"), *table], "<>")]
    if found.kept is not None:
        lines.append(
            f"frozen blocks above the cut, gathered twice: {found.kept.units}; kept whole in between they take "
            f"{size_text(found.kept.held)} on a card and save {size_text(found.kept.saved)} of the backward pass"
        )
    return lines + [f"assumed: {text}" for text in found.assumed]


def _parts(found: Any) -> list[str]:
    """The table of bytes and operations; the column that applies is marked."""
    columns = [("without checkpointing", found.kept, found.everything[0], not found.checkpointing)]
    if found.recomputed is not None:
        columns.append(("with checkpointing", found.recomputed, found.everything[1], found.checkpointing))
    heads = [f"{title} *" if applies else title for title, _, _, applies in columns]
    others = {"weights beside the model": found.beside.weights} if found.beside.weights else {}
    fixed = {
        "weights": found.weights,
        **others,
        "gradients": found.gradients,
        f"optimizer, {found.optimizer}": found.states,
    }
    table = [("", *heads)]
    table += [(name, *[size_text(size)] * len(columns)) for name, size in fixed.items()]
    table.append(("activations", *[size_text(one.peak) for _, one, _, _ in columns]))
    table.append(("together", *[size_text(sum(fixed.values()) + one.peak) for _, one, _, _ in columns]))
    table.append(("operations of a pass", *[f"{one.flops:.3g}" for _, one, _, _ in columns]))
    table.append(("  of training everything", *[f"{one.flops / full:.2f}" for _, one, full, _ in columns]))
    return grid(table, "<>") + ["* applies here"]
