"""What a choice of layers comes to on a model before anything is scored: found once, and handed on to all that ask."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

from layerpeft.model.layers import LayerMap, Target
from layerpeft.selection.budget import Counts
from layerpeft.selection.select import Select


@dataclass(frozen=True)
class Examined:
    """How layers are chosen, and from what: the layers of one stack (or smaller units), and the targets in them that may train.

    `blocks`: names of the blocks of every stack, of the default one first; `costs`: of all of its layers, where those are weighed.
    """

    select: Select
    layers: LayerMap
    targets: tuple[Target, ...]
    blocks: tuple[tuple[str, ...], ...] = ()
    costs: Counts | None = None

    def among(self, layers: Container[int]) -> Examined:
        """The same, with the targets of these layers alone."""
        return replace(self, targets=tuple(t for t in self.targets if t.layer in layers))
