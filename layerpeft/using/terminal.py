"""Text on its way to a terminal: harmless, and wrapped to the width as it comes."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Any, TextIO

from layerpeft.text import cells

# what moves the cursor, hides or turns text around, or ends a line in another way than \n
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_PIECES = re.compile(r"\n|[^\S\n]+|\S+")


def harmless(text: str) -> str:
    """The text with a sign in the place of every control character but line ends and tabs, of those that turn the direction of
    writing around, and of halves of characters."""
    return _HARMFUL.sub(_sign, text.replace("\r\n", "\n"))


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 32 else "\u2421" if code == 127 else "\ufffd"


def escaped(text: str) -> str:
    """JSON with what is harmful in it as \\uXXXX, which reads back as the same."""
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Screen:
    """Where an answer is written as it comes: wrapped to the terminal's width, or as it is where there is none."""

    def __init__(self, file: TextIO | None = None, width: int | None = None) -> None:
        self.file: Any = file or sys.stdout
        wide = shutil.get_terminal_size().columns if self.file.isatty() else None
        self.width = width or wide
        self.at, self.blank = 0, ""

    def write(self, text: str) -> None:
        """Writes a piece; blanks before a line's end wait for the word behind them."""
        text = harmless(text)
        if self.width is None:
            self.file.write(text)
        else:
            for piece in _PIECES.findall(text):
                self._piece(piece, self.width)
        self.file.flush()

    def _piece(self, piece: str, width: int) -> None:
        if piece == "\n":
            self.file.write("\n")
            self.at, self.blank = 0, ""
        elif piece.isspace():
            self.blank += piece.expandtabs(4)
        elif self.at and self.at + cells(self.blank) + cells(piece) > width:
            self.file.write("\n")
            self.at, self.blank = 0, ""
            self._long(piece, width)
        else:
            self.file.write(self.blank)
            self.at += cells(self.blank)
            self.blank = ""
            self._long(piece, width)

    def _long(self, word: str, width: int) -> None:
        for c in word if self.at + cells(word) > width else [word]:
            if self.at and self.at + cells(c) > width:
                self.file.write("\n")
                self.at = 0
            self.file.write(c)
            self.at += cells(c)

    def end(self) -> None:
        """Ends the answer's last line."""
        self.file.write("\n")
        self.file.flush()
        self.at, self.blank = 0, ""
