"""What is kept on a model: one object in its own dict, which copies and pickles of the model take along."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Home:
    """`blocks`: names of the blocks of every stack, where the backward pass is cut; `quantized`: what was packed last; `marks`:
    what PEFT is told of it while it wraps; `tether`: what ties those who follow its adapters to its life; `lowered`: modules with
    a flag that is turned off, and which; `floors`: divided blocks under which nothing is fetched in the backward pass; `within`:
    whether layers train in part."""

    blocks: tuple[tuple[str, ...], ...] = ()
    quantized: Any = None
    marks: frozenset[str] = frozenset()
    tether: Any = None
    floors: list[nn.Module] = field(default_factory=list)
    lowered: dict[nn.Module, str] = field(default_factory=dict)
    within: bool = False


def home_of(model: nn.Module) -> Home:
    """That of a model, which has one from now on."""
    return vars(model).setdefault("_layerpeft", Home())


def known_of(model: nn.Module) -> Home:
    """That of a model, or an empty one."""
    return vars(model).get("_layerpeft") or Home()
