"""What goes through a model in a pass, and what is trained of its weights: all that costs depend on besides shapes."""

from __future__ import annotations

from dataclasses import dataclass

LENGTH = 512  # tokens of a row where nobody says how many


@dataclass(frozen=True)
class Load:
    """What goes through the model in a pass: rows of so many tokens; `again`: blocks are recomputed in the backward pass;
    `tiled`: the head and its loss run together in tiles, without the last token of a row (TRL's); `low`: bytes of an element under
    autocast, 0 without; `padded`: rows are of different lengths, and masked."""

    rows: int = 1
    length: int = LENGTH
    again: bool = False
    tiled: bool = False
    low: int = 0
    padded: bool = False

    @property
    def tokens(self) -> int:
        """Those of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class Work:
    """What is trained of a target: its weight (`rank` 0), and norms with it, or two factors, of which the first may be `fixed`;
    `norms`: those of a layer train, beside factors, too; `dropout`: of what the first factor reads."""

    rank: int = 0
    fixed: bool = False
    norms: bool = False
    dropout: float = 0.0
