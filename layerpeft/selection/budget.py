"""`keep: {time: 50%}`: the best set of layers within a share of what training all of them takes, by the operations of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerpeft.errors import Problem, Problems, SelectionError, unknown
from layerpeft.model.costs import LENGTH, Costs

KEYS = ("time", "length")


@dataclass(frozen=True)
class Budget:
    """`share`: of the operations of a step that trains every layer; `length`: tokens of the rows by which they are counted."""

    share: float
    length: int = LENGTH

    @classmethod
    def parse(cls, keep: Mapping[str, Any], problems: Problems) -> Budget:
        """A budget from `keep`; what is wrong goes to `problems`."""
        trial = Problems("")
        for name in keep:
            if name not in KEYS:
                trial.add(unknown("budget", name, KEYS), str(name))
        share, length = _share(keep.get("time")), keep.get("length", LENGTH)
        if share is None and ("time" in keep or not trial.items):  # a misspelt key is one problem
            trial.add(f"time: {keep.get('time')!r} is not a share between 0 and 1 (0.5, '50%')", "time")
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            trial.add(f"length: {length!r} is not a whole number from 1", "length")
        for item in trial.items:
            assert isinstance(item, Problem)
            problems.add(f"keep: {item}", "keep", *item.path)
        return cls(0.5 if trial.items or share is None else share, LENGTH if trial.items else length)

    def room(self, costs: Costs) -> float:
        """The operations that it allows."""
        return self.share * costs.of(range(len(costs.layers)))


def counted(block: Any, length: Any) -> Any:
    """What holds `select`, with the tokens of the rows that will be trained on where it has a budget that does not say them."""
    select = block.get("select") if isinstance(block, Mapping) else None
    keep = select.get("keep") if isinstance(select, Mapping) else None
    if (
        not isinstance(select, Mapping)
        or not isinstance(keep, Mapping)
        or "length" in keep
        or not isinstance(length, int)
    ):
        return block
    return {**block, "select": {**select, "keep": {**keep, "length": length}}}


def _share(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?%", value):
        value = float(value[:-1]) / 100
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
    return float(value) if good else None


def best_within(values: Sequence[float], among: Sequence[int], costs: Costs, room: float) -> tuple[int, ...]:
    """The layers with the largest sum of values whose operations stay within `room`; at equal sums those that take fewer.

    `values` belong to the layers `among`, which ascend. Exact: for every lowest layer, all sets above it that no other set beats in
    both value and cost are kept (dynamic programming over the Pareto front), contiguous tops among them. Where some values are
    negative they count from the lowest, so that no layer makes a set worse. Raises: SelectionError where no layer fits.
    """
    base = min(0.0, *values) if values else 0.0
    front: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]  # value, own operations, layers
    best: tuple[float, float, tuple[int, ...]] | None = None
    fixed = costs.fixed
    for value, layer in sorted(zip(values, among, strict=True), key=lambda pair: -pair[1]):
        cost, way = costs.layers[layer], sum(c.through + c.again for c in costs.layers[layer:])
        wider = [(v + value - base, own + cost.own, (layer, *held)) for v, own, held in front]
        for found, own, held in wider:
            total = fixed + way + own - cost.saved
            if total <= room and (best is None or (found, -total) > best[:2]):
                best = (found, -total, held)
        front = _undominated([*front, *(f for f in wider if fixed + f[1] <= room)])
    if best is None:
        least = min(among, key=lambda i: costs.of([i]))
        share = math.ceil(100 * costs.of([least]) / costs.of(range(len(costs.layers))))
        raise SelectionError(
            Problem(
                ("keep",),
                f"keep: the budget of {room:.4g} operations holds no layer; the cheapest, {least}, takes "
                f"{costs.of([least]):.4g}: write time: {share}% or more",
            )
        )
    return best[2]


def _undominated(sets: list[tuple[float, int, tuple[int, ...]]]) -> list[tuple[float, int, tuple[int, ...]]]:
    """Those that no other set matches in value at no more operations."""
    kept: list[tuple[float, int, tuple[int, ...]]] = []
    for found in sorted(sets, key=lambda s: (s[1], -s[0])):
        if not kept or found[0] > kept[-1][0]:
            kept.append(found)
    return kept
