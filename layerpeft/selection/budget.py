"""`keep: {time: 50%}` and `{memory: 8GB}`: the best set of layers within what a step may take, in operations or in bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from layerpeft.errors import Problem, Problems, SelectionError, unknown
from layerpeft.model.costs import Costs
from layerpeft.model.load import LENGTH
from layerpeft.selection.typecheck import check, checked
from layerpeft.text import size_of, size_text

OF = ("time", "memory")
ROWS = 8


@dataclass(frozen=True)
class Shape:
    """By what bytes are counted: what the arguments of a training say. `rows` of `length` tokens go through the model at a time;
    `precision`: that of autocast; `fused_head`: TRL's loss, which never forms the logits; `padded`: rows are of different lengths,
    and attention is masked."""

    rows: int = checked(ROWS, least=1)
    length: int = checked(LENGTH, least=1)
    optimizer: str = checked("adamw_torch")
    checkpointing: bool = checked(False)
    precision: Literal["bfloat16", "float16"] | None = checked(None)
    fused_head: bool = checked(False)
    padded: bool = checked(False)

    def __str__(self) -> str:
        how = ", with checkpointing" * self.checkpointing + f", in {self.precision}" * (self.precision is not None)
        return f"{self.rows}{' padded' * self.padded} rows of {self.length} tokens, {self.optimizer}{how}"


@dataclass(frozen=True)
class Budget:
    """`of`: what is limited; `limit`: a share of what training every layer takes, or bytes; `shape`: by what that is counted."""

    of: str
    limit: float
    shape: Shape = Shape()

    @classmethod
    def parse(cls, keep: Mapping[str, Any], problems: Problems) -> Budget:
        """A budget from `keep`; what is wrong goes to `problems`."""
        trial = Problems("")
        of = "memory" if "memory" in keep and "time" not in keep else "time"
        shape = {k: v for k, v in keep.items() if k in Shape.__dataclass_fields__ and v is not None}
        known = (*OF, *Shape.__dataclass_fields__)
        for name in (n for n in keep if n not in known):
            trial.add(unknown("budget", name, known), str(name))
        if all(name in keep for name in OF):
            trial.add("time and memory are two budgets, and a choice has one; leave one of them out", "memory")
        elif of == "time":
            for name in (n for n in shape if n != "length"):
                trial.add(f"{name}: is of a budget of memory", name)
        limit = _limit(of, keep.get(of))
        if limit is None and (of in keep or not trial.items):  # a misspelt key is one problem
            bytes_too = " or a number of bytes ('8GB')" if of == "memory" else ""
            trial.add(f"{of}: {keep.get(of)!r} is not a share between 0 and 1 (0.5, '50%'){bytes_too}", of)
        check(Shape, shape, trial, ": ")
        for item in trial.items:
            assert isinstance(item, Problem)
            problems.add(f"keep: {item}", "keep", *item.path)
        return cls(of, 0.5) if trial.items or limit is None else cls(of, limit, Shape(**shape))

    @property
    def unit(self) -> str:
        """What is counted."""
        return "operations" if self.of == "time" else "bytes"

    def room(self, costs: Counts) -> float:
        """What it allows."""
        return self.limit * costs.of(range(len(costs.layers))) if self.limit < 1 else self.limit

    def said(self, chosen: Sequence[int], costs: Counts) -> str:
        """What a set takes."""
        taken, whole = costs.of(chosen), costs.of(range(len(costs.layers)))
        share = f"{100 * taken / whole:.1f} % of the {self.unit} of training all layers"
        if self.of == "time":
            assert isinstance(costs, Costs)
            return f"{share}, rows of {self.shape.length} tokens{costs.said(chosen)}"
        return f"a step takes {size_text(taken)} of {size_text(self.room(costs))}, {share}; {self.shape}"


class Counts(Protocol):
    """What sets of layers take, put together from the output down. `held` says what the layers above take; of two sets the one that
    takes no more in any of its numbers takes no more in the end."""

    @property
    def layers(self) -> Sequence[Any]: ...
    @property
    def top(self) -> tuple[int, ...]: ...
    def above(self, held: tuple[int, ...], layer: int, trains: bool) -> tuple[int, ...]: ...
    def closed(self, held: tuple[int, ...], layer: int) -> float: ...
    def least(self, held: tuple[int, ...]) -> float: ...
    def of(self, chosen: Sequence[int]) -> float: ...
    def too_small(self, room: float, layer: int) -> str: ...


def counted(block: Any, said: Mapping[str, Any]) -> Any:
    """What holds `select`, with what a training's arguments say of rows where it has a budget that does not say it itself; and of
    epochs where states are kept."""
    select = block.get("select") if isinstance(block, Mapping) else None
    keep = select.get("keep") if isinstance(select, Mapping) else None
    if not isinstance(select, Mapping):
        return block
    weighs = select.get("per") == "cost" or isinstance(keep, Mapping) and "time" in keep
    if weighs and block.get("prefix_cache") is not None and said.get("epochs") is not None:
        select = {"epochs": said["epochs"], **select}
    if not isinstance(keep, Mapping):
        return {**block, "select": select}
    names = ("length",) if "time" in keep else Shape.__dataclass_fields__ if "memory" in keep else ()
    found = {n: said[n] for n in names if n not in keep and said.get(n) is not None}
    return {**block, "select": {**select, "keep": {**keep, **found}}}


def _limit(of: str, value: Any) -> float | None:
    """A share, or bytes; None where it is neither."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?%", value):
        value = float(value[:-1]) / 100
        return value if 0 < value < 1 else None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return value
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    return size_of(whole) or None if of == "memory" else None


_Set = tuple[float, tuple[int, ...], tuple[int, ...]]  # value, what its layers take, layers


def best_within(values: Sequence[float], among: Sequence[int], costs: Counts, room: float) -> tuple[int, ...]:
    """The layers with the largest sum of values that take no more than `room`; at equal sums those that take less.

    `values` belong to the layers `among`, which ascend. Exact: for every lowest layer, all sets above it that no other set beats in
    both value and cost are kept (dynamic programming over the Pareto front), contiguous tops among them. Where some values are
    negative they count from the lowest, so that no layer makes a set worse. Raises: SelectionError where no layer fits.
    """
    base = min(0.0, *values) if values else 0.0
    worth = {layer: value - base for layer, value in zip(among, values, strict=True)}
    front: list[_Set] = [(0.0, costs.top, ())]
    best: tuple[float, float, tuple[int, ...]] | None = None
    for layer in range(len(costs.layers) - 1, -1, -1):
        wider: list[_Set] = []
        if layer in worth:
            for value, held, layers in front:
                total, found = costs.closed(held, layer), value + worth[layer]
                if total <= room and (best is None or (found, -total) > best[:2]):
                    best = (found, -total, (layer, *layers))
                wider.append((found, costs.above(held, layer, True), (layer, *layers)))
        same = [(value, costs.above(held, layer, False), layers) for value, held, layers in front]
        front = _undominated([s for s in (*same, *wider) if costs.least(s[1]) <= room])
    if best is None:
        least = min(among, key=lambda i: costs.of([i]))
        raise SelectionError(Problem(("keep",), f"keep: the budget of {costs.too_small(room, least)}"))
    return best[2]


def _undominated(sets: list[_Set]) -> list[_Set]:
    """Those that no other set matches in value at no more cost."""
    kept: list[_Set] = []
    for found in sorted(sets, key=lambda s: (s[1], -s[0])):
        rivals = kept[-1:] if len(found[1]) == 1 else kept  # of one number the last has the highest value
        if not any(s[0] >= found[0] and all(a <= b for a, b in zip(s[1], found[1], strict=True)) for s in rivals):
            kept.append(found)
    return kept
