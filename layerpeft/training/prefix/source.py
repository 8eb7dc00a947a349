"""Where states come from in a model of which nothing below the cut is loaded: a complete filling, and what is said where it lacks
something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from layerpeft.errors import ConfigError
from layerpeft.training.prefix.ahead import Ahead

SHOWN = 12  # ids of tokens in a message


class MissingRow(ConfigError):
    """A row was not filled ahead. `ids`: its tokens, as far as they are known."""

    def __init__(self, text: str, ids: Sequence[int]) -> None:
        super().__init__(text)
        self.ids = tuple(ids)


@dataclass(frozen=True)
class Source:
    """A complete filling, in a folder below `root`; `command`: what fills more rows."""

    root: Path
    ahead: Ahead
    command: str

    @property
    def stack(self) -> str:
        """The path of the stack that the block at the cut is one of."""
        return self.ahead.block.rpartition(".")[0]

    def lacks(self, why: str) -> ConfigError:
        """A pass cannot begin at the cut, and there is no other way."""
        return ConfigError(
            f"{why}; below layer {self.ahead.cut} nothing is loaded, and what enters it was filled ahead"
        )

    def missing(self, count: int, ids: Sequence[int]) -> MissingRow:
        """Of a row of `count` tokens nothing is there."""
        shown = f" that begins with the ids {', '.join(map(str, ids[:SHOWN]))}" if ids else ""
        return MissingRow(
            f"a row of {count:,} tokens{shown} was not filled ahead, and below layer {self.ahead.cut} nothing is loaded that "
            f"could compute what enters it; fill what is missing:\n  {self.command}",
            ids,
        )


def source_of(model: nn.Module) -> Source | None:
    """That of a model whose upper part alone is there; None of any other."""
    return next((s for m in model.modules() if isinstance(s := vars(m).get("source"), Source)), None)
