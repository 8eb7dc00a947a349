"""A preview as a person reads it: marks in colour or in brackets, lines no wider than the screen, nothing that a terminal obeys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from layerpeft.recipe.preview import Part, Preview
from layerpeft.recipe.tokens import Tally
from layerpeft.text import cells, grid

PLAIN, LEARNED, CUT = "plain", "learned", "cut"
COLOURS = {LEARNED: ("\x1b[1;32m", "\x1b[0m"), CUT: ("\x1b[9;31m", "\x1b[0m"), PLAIN: ("", "")}
BRACKETS = {LEARNED: ("⟦", "⟧"), CUT: ("⟪", "⟫"), PLAIN: ("", "")}
ASCII = {LEARNED: ("[[", "]]"), CUT: ("<<", ">>"), PLAIN: ("", "")}
WORDS = {LEARNED: "carries loss", CUT: "cut at max_length"}
LONG = 3  # lines of one run that are shown before its middle is left out
TOKENS = 24  # of a sequence that are shown one by one


@dataclass(frozen=True)
class Screen:
    """How wide lines may be, how marks are set, and whether everything is shown."""

    width: int
    colour: bool = False
    unicode: bool = True
    full: bool = False

    @property
    def marks(self) -> dict[str, tuple[str, str]]:
        return COLOURS if self.colour else BRACKETS if self.unicode else ASCII


def harmless(text: str) -> str:
    """Text in which no character moves a cursor, changes a colour or turns the direction of writing; line ends stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def told(found: Preview, screen: Screen) -> str:
    """All of it."""
    marks = screen.marks
    lines = ["   ".join(f"{marks[state][0]}{word}{marks[state][1]}" for state, word in WORDS.items())]
    for number, row in enumerate(found.shown, 1):
        for part in row.parts:
            lines += ["", _fitted(_head(number, part), screen.width)]
            lines += _wrapped(_runs(part, found.tokenizer, screen), screen)
            lines += [_dim("tokens:", screen), *_tokens(part, found.tokenizer, screen)]
        if not row.parts:
            lines += ["", f"row {number}"]
        lines += [_fitted(f"  {harmless(fact)}", screen.width) for fact in row.facts]
    for what, tally in found.counts.items():
        lines += ["", *_counted(what, tally, found, screen)]
    return "\n".join(lines)


def _head(number: int, part: Part) -> str:
    name = f", {part.name}" if part.name else ""
    packed = f", {len(part.starts) + 1} rows packed" if part.starts else ""
    cut = f", {len(part.cut)} cut {'before' if part.before else 'after'} them" if part.cut else ""
    loss = f", {sum(part.learned)} with loss" if part.learned else ""
    return f"row {number}{name}: {len(part.ids)} tokens{loss}{packed}{cut}"


def _counted(what: str, tally: Tally, found: Preview, screen: Screen) -> list[str]:
    """What became of all rows."""
    cells = [(f"{what} rows", str(tally.read)), ("  left", str(tally.kept))]
    if tally.max_length is not None or tally.cut:
        cells.append((f"  cut at max_length: {tally.max_length}", str(tally.cut)))
    cells += [(f"  left out: they {reason}", str(count)) for reason, count in tally.dropped.items()]
    cells += [("  with an empty text or answer", str(tally.blank))] * bool(tally.blank)
    cells.append(("  copies of other rows", str(found.copies.get(what, 0))))
    if what == "training" and found.packed is not None:
        cells.append(("  packed into sequences", str(found.packed)))
    lines = [_fitted(line, screen.width) for line in grid(cells, "<>")]
    return (
        [*lines, _fitted(f"  the first that is left out: {harmless(tally.first)}", screen.width)]
        if tally.first
        else lines
    )


# ---- sequences ------------------------------------------------------------------------------------------------------

Runs = list[tuple[str, str]]  # a mark's name, and text


def _runs(part: Part, tokenizer: Any, screen: Screen) -> Runs:
    """The text of a sequence, as it is read where marks change."""
    states = [LEARNED if flag else PLAIN for flag in part.learned or (False,) * len(part.ids)]
    found: Runs = []
    for (state, _), group in groupby(enumerate(states), key=lambda item: (item[1], _pack(part, item[0]))):
        places = [i for i, _ in group]
        bar = "\n" if places[0] in part.starts else ""
        text = tokenizer.decode([part.ids[i] for i in places])
        found.append((state, bar + _short(harmless(text), screen)))
    cut = [(CUT, _short(harmless(tokenizer.decode(list(part.cut))), screen))] if part.cut else []
    return [*cut, *found] if part.before else [*found, *cut]


def _pack(part: Part, index: int) -> int:
    return sum(start <= index for start in part.starts)


def _short(text: str, screen: Screen) -> str:
    most = LONG * screen.width
    if screen.full or len(text) <= most + 40:  # what stands in its place is not much shorter
        return text
    left = len(text) - most
    return f"{text[: most // 2]} […{left} characters…] {text[-(most - most // 2) :]}"


def _tokens(part: Part, tokenizer: Any, screen: Screen) -> list[str]:
    """Lines of tokens one by one: the first, those around the place where loss begins, the last."""
    count = len(part.ids)
    first = next((i for i, flag in enumerate(part.learned) if flag), 0)
    near = {*range(4), *range(first - 6, first + 8), *range(count - 6, count)}
    lines, line, used = [], "", 0
    last = -1
    for i in (i for i in range(count) if screen.full or count <= TOKENS or i in near):
        before = f"(+{i - last - 1}) " if i != last + 1 else ""
        piece = _clipped(harmless(tokenizer.decode([part.ids[i]])).replace("\n", "\\n"), screen.width // 2)
        start, end = screen.marks[LEARNED if part.learned and part.learned[i] else PLAIN]
        size = cells(f"{before}{piece} {part.ids[i]}  ") + (0 if screen.colour else len(start + end))
        if used + size + 2 > screen.width and line:
            lines.append(f"  {line}".rstrip())
            line, used = "", 0
        line, used, last = f"{line}{before}{start}{piece}{end} {part.ids[i]}  ", used + size, i
    return [*lines, f"  {line}".rstrip()]


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width]}…"


def _wrapped(runs: Runs, screen: Screen) -> list[str]:
    """Runs in lines of the screen's width, each two blanks in; marks are closed at the end of a line and set again."""
    lines: list[str] = []
    line, used = "", 0
    edge = 0 if screen.colour else max(len(mark) for pair in screen.marks.values() for mark in pair)

    for state, text in runs:
        opened = False
        for piece in _pieces(text):
            size = cells(piece)
            if piece == "\n" or used + size + 2 * edge + 2 > screen.width:
                if opened or line:
                    lines.append(f"  {line}{screen.marks[state][1] if opened else ''}".rstrip())
                    line, used, opened = "", 0, False
                if piece == "\n":
                    continue
            if not opened:
                line, opened = line + screen.marks[state][0], True
                used += edge
            line, used = line + piece, used + size
        if opened:
            line, used = line + screen.marks[state][1], used + edge
    if line:
        lines.append(f"  {line}".rstrip())
    return lines


def _pieces(text: str) -> Iterator[str]:
    """Characters with what is written over them."""
    piece = ""
    for c in text:
        if piece and cells(c):
            yield piece
            piece = ""
        piece += c
    if piece:
        yield piece


def _dim(text: str, screen: Screen) -> str:
    return f"  \x1b[2m{text}\x1b[0m" if screen.colour else f"  {text}"


def _fitted(text: str, width: int) -> str:
    """A line no wider than the screen."""
    return text if len(text) <= width else f"{text[: width - 1]}…"
