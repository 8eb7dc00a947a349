"""How arms of a comparison are called, in what is written and before a person."""

from __future__ import annotations

OURS = "recipe"  # the recipe's own arm where its choice does not name it
DRAW = "random:"  # what the name of a draw begins with; its number follows, from 1


def is_draw(arm: str) -> bool:
    """Whether this is one draw of random layers."""
    return arm.startswith(DRAW)


def group_of(arm: str) -> str:
    """The name under which runs of an arm stand together: draws are one arm."""
    return "random" if is_draw(arm) else arm


def label_of(arm: str) -> str:
    """An arm as a person reads it: `random:3` asks for three draws, and this is the third of them; `last:3` are three layers."""
    return f"random, draw {arm.removeprefix(DRAW)}" if is_draw(arm) else arm
