"""What a training step holds by layer, in bytes, put together from what each layer leaves and takes on the way there and back.

A pass is a walk: a layer leaves behind what its backward pass will need, is highest while it works, and on the way back lets go of
that and leaves gradients. Which of its steps is the highest of all depends on what trains: the head for adapters, the end of
the backward pass where gradients are as large as weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from layerpeft.text import size_text

# of layers from the top down: the most from there on, what is left after the way back, bytes that last
Held = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Bytes of one layer above what is there before it: `kept` after its forward pass, `peak` in that; in its backward pass,
    above what is there when that begins, `back` at its peak and `left` when it ends (less than nothing, mostly)."""

    kept: int
    peak: int
    back: int
    left: int


@dataclass(frozen=True)
class LayerBytes:
    """A layer that is frozen above one that trains, one that trains above another, and one below which nothing trains.
    `lasting`: weights and optimizer states that training it adds."""

    frozen: Span
    trained: Span
    lowest: Span
    lasting: int


class Below(NamedTuple):
    """Where nothing below a layer trains: bytes when its forward pass begins, the most by then, and what is there besides."""

    start: int
    most: int
    besides: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step. `lasting`: where no layer trains; `below`: by lowest layer; `head`: the most above all layers,
    and what is left of that; `slack`: a little more than the share by which sets were counted to take more."""

    lasting: int
    below: tuple[Below, ...]
    head: tuple[int, int]
    layers: tuple[LayerBytes, ...]
    slack: float = 0.0

    @cached_property
    def _freed(self) -> int:
        """Less than nothing where layers take less once they train, because they are packed then."""
        return sum(min(0, layer.lasting) for layer in self.layers)

    @property
    def top(self) -> Held:
        """Above all layers."""
        return (*self.head, 0)

    def least(self, held: Held) -> float:
        """What a set that holds these layers takes at least."""
        return (self.lasting + held[0] + self._freed) * (1 + self.slack)

    def above(self, held: Held, layer: int, trains: bool) -> Held:
        """With a layer below which another one trains."""
        found = self.layers[layer]
        return _with(held, found.trained if trains else found.frozen, found.lasting * trains)

    def closed(self, held: Held, layer: int) -> float:
        """The bytes of a step of which this is the lowest layer that trains, below those of `held`."""
        found, below = self.layers[layer], self.below[layer]
        most, _, lasting = _with(held, found.lowest, found.lasting)
        return (self.lasting + max(below.most + lasting, below.start + most) + below.besides) * (1 + self.slack)

    def of(self, chosen: Collection[int]) -> float:
        """Those of training these layers. Raises: ValueError for none."""
        held, lowest = self.top, min(chosen)
        for layer in range(len(self.layers) - 1, lowest, -1):
            held = self.above(held, layer, layer in chosen)
        return self.closed(held, lowest)

    def too_small(self, room: float, layer: int) -> str:
        """That a budget holds not even this layer."""
        least = math.ceil(self.of([layer]))
        takes = f"takes {size_text(least)}: write memory: {least} or more"
        return f"{size_text(room)} holds no layer; the cheapest, {layer}, {takes}"


def _with(held: Held, span: Span, lasting: int) -> Held:
    most, left, before = held
    way = max(most, left + span.back)
    there = max(span.peak + before + lasting, span.kept + lasting + way)
    return there, span.kept + span.left + lasting + left, before + lasting
