"""Drawing in a page: elements of SVG as text, scales, ticks and axes.

Colours are classes of the page's style sheet, so that one picture serves light and dark. A picture is `WIDE` units across, which
is a phone's width: it is never shown smaller than it was drawn.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDE = 344.0
SMALL, LARGE = 1e-290, 2.0**64  # steps below the first have lost digits; times the second they have not
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 8.0, 34.0  # margins around a plot


def element(name: str, inside: str = "", **given: object) -> str:
    """An element with its attributes; `class_` is written `class`, `stroke_width` `stroke-width`. `inside` is markup."""
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"' for key, value in given.items())
    return f"<{name}{said}>{inside}</{name}>" if inside else f"<{name}{said}/>"


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def words(text: str, x: float, y: float, anchor: str = "middle", **more: object) -> str:
    """A line of text."""
    return element("text", escape(text), x=x, y=y, text_anchor=anchor, **more)


def picture(height: float, inside: Iterable[str], title: str, about: str) -> str:
    """A whole picture; `title` and `about` say in words what it shows, to who does not see it."""
    view = f"0 0 {_text(WIDE)} {_text(height)}"
    return element("svg", "".join(inside), viewBox=view, role="img", aria_label=f"{title}: {about}")


def path(boxes: Iterable[tuple[float, float, float, float]], **given: object) -> str:
    """Many boxes (x, y, width, height) as one element; nothing for none."""
    drawn = "".join(f"M{_text(x)} {_text(y)}h{_text(w)}v{_text(h)}h-{_text(w)}z" for x, y, w, h in boxes if w > 0 < h)
    return element("path", "", d=drawn, **given) if drawn else ""


def line(points: Sequence[tuple[float, float]], **given: object) -> str:
    """A line through points of the picture."""
    return element("polyline", "", points=" ".join(f"{_text(x)},{_text(y)}" for x, y in points), **given)


@dataclass(frozen=True)
class Plot:
    """A part of a picture with numbers along both sides: `x` and `y` as (least, most); `height` of the whole picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: float
    left: float = LEFT
    top: float = TOP

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the picture."""
        return self.across(x), self.down(y)

    def across(self, x: float) -> float:
        """Where a number of the horizontal axis lies."""
        return self.left + (WIDE - RIGHT - self.left) * _share(x, self.x)

    def down(self, y: float) -> float:
        """Where a number of the vertical axis lies."""
        return self.bottom - (self.bottom - self.top) * _share(y, self.y)

    def axes(self, below: str, whole: bool = False, rows: Mapping[float, str] | None = None) -> str:
        """Rules, numbers and the name of the horizontal axis. `whole`: it has whole numbers alone; `rows`: labels of the other one,
        in the place of numbers."""
        parts = []
        for y in ticks(*self.y) if rows is None else rows:
            here = self.down(y)
            if rows is None:
                parts.append(
                    element("path", d=f"M{_text(self.left)} {_text(here)}H{_text(WIDE - RIGHT)}", class_="rule")
                )
            parts.append(words(rows[y] if rows else short(y), self.left - 5, here + 3.5, "end"))
        for x in ticks(*self.x, 7):
            if not whole or x == int(x):
                parts.append(words(short(x), self.across(x), self.bottom + 13))
        parts.append(words(below, (self.left + WIDE - RIGHT) / 2, self.height - 5, class_="name"))
        return "".join(parts)


def _share(value: float, ends: tuple[float, float]) -> float:
    least, most = ends
    if math.isinf(most - least):  # numbers of which a picture shows no more than their order
        value, least, most = value / 2, least / 2, most / 2
    return (value - least) / (most - least) if most > least else 0.5


def around(values: Sequence[float], share: float, least: float) -> tuple[float, float]:
    """The ends of an axis with room at both: a share of what the values span, or `least` where they are all one."""
    low, high = min(values), max(values)
    room = share * high - share * low or least
    return max(low - room, -sys.float_info.max), min(high + room, sys.float_info.max)


def ticks(least: float, most: float, number: int = 5) -> list[float]:
    """About so many round numbers from `least` to `most`."""
    if not most > least:
        return [least]
    if math.isinf(most - least):
        return [found for tick in ticks(least / 4, most / 4, number) if math.isfinite(found := tick * 4)]
    rough = (most - least) / number
    if rough < SMALL:
        return list(dict.fromkeys(tick / LARGE for tick in ticks(least * LARGE, most * LARGE, number)))
    size = 10 ** math.floor(math.log10(rough))
    step = next((size * m for m in (1, 2, 5) if size * m >= rough * 0.999), size * 10)
    first = math.ceil(least / step - 1e-9)
    return [float(f"{step * n:.12g}") for n in range(first, math.floor(most / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few letters."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.4g}"
