"""The pictures of a page, each a function from plain numbers to SVG; an empty text where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from layerpeft.quantization.picture import COLOURS
from layerpeft.recipe.page.svg import LEFT, RIGHT, TOP, WIDE, Plot, around, element, line, path, picture, short, words
from layerpeft.text import measured, size_text

POINTS = 400  # of a curve
EACH = 128  # bars that say their numbers where a pointer rests on them; more are drawn as one
DOWN, ACROSS = 96, 240  # cells of a map; more layers or steps than that share cells
SHADES = 8
LETTER = 6.6  # how wide one is
Points = Sequence[tuple[float, float]]
Span = tuple[int, int, Sequence[int], Sequence[float | None] | None]  # from a step to another: layers, and scores


def curves(training: Points, held_out: Points) -> str:
    """Loss over optimizer steps."""
    everything = [*training, *held_out]
    if not everything:
        return ""
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    plot = Plot((min(0.0, *xs), max(*xs, 1.0)), around(ys, 0.05, 0.5), 220.0)
    parts = [plot.axes("optimizer step", whole=True)]
    if len(training) > 1:
        parts.append(line([plot.at(*p) for p in _thinned(training)], class_="first"))
    parts += [_dot(plot, p, "first", 2.5, "training loss") for p in training] if len(training) <= 60 else []
    if len(held_out) > 1:
        parts.append(line([plot.at(*p) for p in _thinned(held_out)], class_="second"))
    parts += [_dot(plot, p, "second", 3.5, "held-out loss") for p in held_out] if len(held_out) <= 60 else []
    said = [f"{what} from {ps[0][1]:.4g} to {ps[-1][1]:.4g}" for what, ps in _named(training, held_out)]
    return picture(220.0, parts, "Loss over optimizer steps", "; ".join(said))


def _named(training: Points, held_out: Points) -> Iterator[tuple[str, Points]]:
    yield from ((what, ps) for what, ps in (("training", training), ("held-out", held_out)) if ps)


def _dot(plot: Plot, point: tuple[float, float], kind: str, size: float, what: str) -> str:
    x, y = plot.at(*point)
    told = element("title", f"step {short(point[0])}: {what} {measured(point[1])}")
    return element("circle", told, cx=x, cy=y, r=size, class_=f"dot {kind}")


def _thinned(points: Points) -> Points:
    """At most so many points: the mean of those that stand together."""
    every = math.ceil(len(points) / POINTS)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return [(_mean([x for x, _ in g]), _mean([y for _, y in g])) for g in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)  # a sum of them all may be more than a number can say


def bars(values: Sequence[float | None], chosen: Sequence[bool], unit: str, what: str, percent: bool = False) -> str:
    """A bar for every layer, or unit, those that were chosen in a colour of their own. `percent`: the values are shares."""
    scale = 100.0 if percent else 1.0
    values = [None if value is None else finite(value * scale) for value in values]
    known = [v for v in values if v is not None]
    if not known:
        return ""
    most, least = max(0.0, *known), min(0.0, *known)
    plot = Plot((-0.5, len(values) - 0.5), (least, most or 1.0), 170.0)
    wide = (WIDE - RIGHT - LEFT) / len(values)
    boxes: dict[bool, list[tuple[float, float, float, float]]] = {True: [], False: []}
    told = {True: [], False: []}
    for place, value in enumerate(values):
        if value is None:
            continue
        ends = sorted((plot.down(value), plot.down(0.0)))
        inset = min(0.12 * wide, 2.0)
        box = (plot.across(place) - wide / 2 + inset, ends[0], wide - 2 * inset, max(ends[1] - ends[0], 0.5))
        boxes[bool(chosen[place])].append(box)
        told[bool(chosen[place])].append(f"{unit} {place}: {value:.4g}{'%' if percent else ''}")
    parts = [plot.axes(unit, whole=True)]
    for kind, name in ((True, "first"), (False, "rest")):
        each = len(values) <= EACH
        parts += [_box(box, text, name) for box, text in zip(boxes[kind], told[kind])] if each else []
        parts.append("" if each else path(boxes[kind], class_=f"fill {name}"))
    highest = sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: -(values[i] or 0.0))[:5]
    about = f"highest at {', '.join(f'{unit} {i} ({values[i] or 0.0:.3g})' for i in highest)}"
    return picture(170.0, parts, f"{what} by {unit}", about)


def strip(chosen: Sequence[bool], unit: str) -> str:
    """Which were chosen, where no scores say why; nothing where that were all."""
    if all(chosen):
        return ""
    plot = Plot((-0.5, len(chosen) - 0.5), (0.0, 1.0), 70.0, left=RIGHT)
    wide = (WIDE - 2 * RIGHT) / len(chosen)
    boxes = {
        each: [
            (plot.across(i) - 0.45 * wide, TOP, 0.9 * wide, plot.bottom - TOP)
            for i, c in enumerate(chosen)
            if c == each
        ]
        for each in (True, False)
    }
    parts = [path(boxes[True], class_="fill first"), path(boxes[False], class_="fill rest")]
    said = ", ".join(str(i) for i, c in enumerate(chosen) if c)
    return picture(70.0, [plot.axes(unit, whole=True, rows={}), *parts], f"Chosen {unit}s", said)


def _box(box: tuple[float, float, float, float], told: str, kind: str) -> str:
    x, y, wide, high = box
    return element("rect", element("title", told), x=x, y=y, width=wide, height=high, class_=f"fill {kind}")


# ---- maps -----------------------------------------------------------------------------------------------------------


def heatmap(spans: Sequence[Span], layers: int, steps: int, unit: str) -> str:
    """Which layers trained when: layers upwards, optimizer steps across, darker by score and by how much of a cell's time."""
    if not spans or steps < 1 or layers < 1:
        return ""
    down, across = min(layers, DOWN), min(steps, ACROSS)
    cells = [[0.0] * across for _ in range(down)]
    most = max((s for *_, scores in spans for s in scores or () if s is not None), default=None)
    for begin, end, active, scores in spans:
        for layer in active:
            if not 0 <= layer < layers:
                continue
            score = scores[layer] if scores and layer < len(scores) else None
            strength = 0.75 if score is None or not most else 0.3 + 0.7 * max(score, 0.0) / most
            _spread(
                cells[layer * down // layers], begin * across / steps, end * across / steps, strength * down / layers
            )
    height = 60.0 + max(110.0, min(330.0, 12.0 * down))
    plot = Plot((0.0, float(steps)), (-0.5, layers - 0.5), height)
    high, wide = (plot.bottom - plot.top) / down, (WIDE - RIGHT - LEFT) / across
    shades: dict[int, list[tuple[float, float, float, float]]] = {}
    for row, strengths in enumerate(cells):
        y = plot.bottom - (row + 1) * high
        for first, last, shade in _runs(strengths):
            shades.setdefault(shade, []).append(
                (LEFT + first * wide, y + 0.06 * high, (last - first) * wide, 0.88 * high)
            )
    parts = [path(boxes, class_="fill first", fill_opacity=shade / SHADES) for shade, boxes in sorted(shades.items())]
    often = _often(spans, layers, steps)
    about = ", ".join(f"{unit} {i} for {100 * share:.0f}% of all steps" for i, share in often[:5])
    return picture(height, [plot.axes("optimizer step", whole=True), *parts], f"Which {unit}s trained when", about)


def _spread(row: list[float], begin: float, end: float, strength: float) -> None:
    """Adds a stretch to the cells that it covers, in part where it covers them in part."""
    for place in range(max(0, int(begin)), min(len(row), math.ceil(end))):
        row[place] += strength * max(0.0, min(end, place + 1) - max(begin, place))


def _runs(strengths: Sequence[float]) -> Iterator[tuple[int, int, int]]:
    """Neighbours of one shade: the first, the one after the last, the shade from 1."""
    shades = [min(SHADES, math.ceil(s * SHADES - 1e-9)) for s in strengths]
    first = 0
    for place in range(1, len(shades) + 1):
        if place == len(shades) or shades[place] != shades[first]:
            if shades[first]:
                yield first, place, shades[first]
            first = place


def _often(spans: Sequence[Span], layers: int, steps: int) -> list[tuple[int, float]]:
    """Layers by the share of all steps that they trained in, the highest first."""
    found = dict.fromkeys(range(layers), 0)
    for begin, end, active, _ in spans:
        for layer in active:
            if layer in found:
                found[layer] += end - begin
    return sorted(((i, n / steps) for i, n in found.items() if n), key=lambda pair: (-pair[1], pair[0]))


def bits(kinds: Sequence[str], table: Mapping[tuple[str, int], str]) -> str:
    """Layers across, their linears down, and the precision of each as a colour."""
    if not table:
        return ""
    layers, left = max(layer for _, layer in table) + 1, 116.0
    height = 24.0 * len(kinds) + 50.0
    plot = Plot((-0.5, layers - 0.5), (-0.5, len(kinds) - 0.5), height, left=left)
    wide, high = (WIDE - RIGHT - left) / layers, (plot.bottom - plot.top) / len(kinds)
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for (kind, layer), precision in table.items():
        row = len(kinds) - 1 - kinds.index(kind)
        x, y = plot.across(layer) - wide / 2, plot.down(row) - high / 2
        boxes.setdefault(precision, []).append((x + 0.04 * wide, y + 1, 0.92 * wide, high - 2))
    names = {float(len(kinds) - 1 - i): kind[-18:] for i, kind in enumerate(kinds)}
    parts = [path(found, class_="fill edge", style=f"fill:{COLOURS.get(p, '#888')}") for p, found in boxes.items()]
    counted = ", ".join(f"{len(found)} linears in {p}" for p, found in boxes.items())
    return picture(height, [plot.axes("layer", whole=True, rows=names), *parts], "Precision by layer", counted)


# ---- memory, and arms -----------------------------------------------------------------------------------------------


def memory(rows: Sequence[tuple[str, Mapping[str, int]]], order: Sequence[str]) -> str:
    """Bytes by part, a line for each way to know them: planned, measured. `order`: of the parts, by which they are coloured."""
    rows = [(name, parts) for name, parts in rows if parts]
    most = max((sum(parts.values()) for _, parts in rows), default=0)
    if not most:
        return ""
    height, parts = 52.0 * len(rows) - 6.0, []
    for place, (name, found) in enumerate(rows):
        y, x = 52.0 * place + 20.0, 0.0
        parts.append(words(f"{name}: {size_text(sum(found.values()))}", 0.0, y - 6, "start"))
        for part, size in found.items():
            wide = size / most * WIDE
            parts.append(_box((x, y, max(wide, 0.5), 22.0), f"{part}: {size_text(size)}", part_class(order, part)))
            x += wide
    ends = [f"{name}: {', '.join(f'{k} {size_text(v)}' for k, v in found.items())}" for name, found in rows]
    return picture(height, parts, "Memory by part", "; ".join(ends))


def part_class(order: Sequence[str], part: str) -> str:
    """The class of the colour that a part has, in the picture and beside it."""
    return f"part{order.index(part) % 6}"


def arms(groups: Mapping[str, Sequence[float]], before: float | None, measure: str) -> str:
    """A line for each arm, a dot for each of its runs, a stroke at their mean where there are several."""
    values = [v for found in groups.values() for v in found]
    if not values:
        return ""
    height, left = 34.0 * len(groups) + 50.0, 16.0 + LETTER * max(len(name[:16]) for name in groups)
    ends = around(values, 0.08, 0.05 * abs(values[0]) or 0.5)
    plot = Plot(ends, (-0.5, len(groups) - 0.5), height, left=left)
    names = {float(len(groups) - 1 - i): name[:16] for i, name in enumerate(groups)}
    parts = [plot.axes(measure, rows=names)]
    for row, (name, found) in zip(names, groups.items(), strict=True):
        kind = "second" if row == len(groups) - 1 else "first"
        for value in found:
            x, y = plot.at(value, row)
            told = element("title", f"{escape(name)}: {measured(value)}")
            parts.append(element("circle", told, cx=x, cy=y, r=5, class_=f"dot {kind}"))
        if len(found) > 1:
            x, y = plot.at(_mean(found), row)
            parts.append(line([(x, y - 11), (x, y + 11)], class_=kind))
    said = "; ".join(f"{name} {measured(_mean(found))}" for name, found in groups.items())
    more = f"; {measured(before)} before training" if before is not None else ""
    return picture(height, parts, f"{measure} of every arm", said + more)


def finite(value: Any) -> float | None:
    """A number that can be drawn; None of anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of more digits than that
        return None
    return found if math.isfinite(found) else None
