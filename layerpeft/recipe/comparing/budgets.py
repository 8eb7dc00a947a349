"""An equal budget for every arm: bytes, trainable parameters, or operations. What an arm is given, and how near it comes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerpeft.errors import LayerpeftError, RecipeError, unknown
from layerpeft.planning.plan import Cost, cost, trainable
from layerpeft.recipe.comparing.entries import Entry
from layerpeft.recipe.plan import empty, told
from layerpeft.recipe.recipe import Recipe, layer_config
from layerpeft.recipe.trainer import Setup
from layerpeft.text import no_size, size_of, size_text

KINDS = ("memory", "parameters", "time")
NEAR = 0.995  # of the budget: nearer is not looked for
_MANY = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Budget:
    """What every arm may take: `memory` in bytes, `parameters`, or `time` in operations; None: what the recipe's own arm does."""

    kind: str
    amount: int | None = None

    def text(self, amount: float) -> str:
        """An amount of it, as a person reads it."""
        return (
            size_text(amount)
            if self.kind == "memory"
            else f"{amount:,.0f}"
            if self.kind == "parameters"
            else f"{amount:.3g}"
        )


@dataclass(frozen=True)
class Given:
    """What an arm was given: layers that train at once, rank, steps (None: as many epochs), learning rate; what a step takes at its
    highest (bytes), what trains, operations of all steps; and how much of the budget that is."""

    count: int | None
    rank: int | None
    steps: int | None
    rate: float
    peak_bytes: int
    parameters: int
    operations: float | None
    share: float | None = None


@dataclass(frozen=True)
class Left:
    """An arm that is not compared, and why."""

    arm: str
    why: str


def parse_budget(text: str) -> Budget:
    """As "memory", "memory=24GB", "parameters=2M", "time=1e15". Raises: RecipeError."""
    kind, equals, number = text.partition("=")
    if kind not in KINDS:
        raise RecipeError(f"--budget: {unknown('budget', kind, KINDS)}")
    if not equals:
        return Budget(kind)
    amount = size_of(number) if kind == "memory" else _number(number)
    if not amount:
        example = {"memory": "24GB", "parameters": "2M", "time": "1e15 (operations)"}[kind]
        lacks = f"; {no_size(number)}" if kind == "memory" and amount is None else ""
        raise RecipeError(f"--budget: {number!r} is no amount above 0; write {kind}={example}{lacks}")
    return Budget(kind, amount)


def _number(text: str) -> int | None:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE]\+?[0-9]+)?)([kKMGBT]?)", text.strip())
    amount = float(found[1]) * _MANY[found[2]] if found else math.inf
    return int(amount) if math.isfinite(amount) else None


class Counter:
    """What arms of one comparison cost, on the model without weights: each asked for once."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.model = setup, empty(setup)
        self.known: dict[Any, Any] = {}

    def cost(self, entry: Entry) -> Cost:
        """Of a step. Raises: LayerpeftError."""
        return self._once(cost, entry, **self._told(entry))

    def trainable(self, entry: Entry) -> int:
        """Elements that train at once. Raises: LayerpeftError."""
        return self._once(trainable, entry, step=self._told(entry)["step"])

    def _told(self, entry: Entry) -> dict[str, Any]:
        return told(entry.recipe, replace(self.setup, recipe=entry.recipe), torch.accelerator.is_available())

    def _once(self, ask: Callable[..., Any], entry: Entry, **options: Any) -> Any:
        config = layer_config(entry.recipe, entry.select)
        key = (ask.__name__, config.method, str(config.to_dict()), str(options))
        if key not in self.known:
            self.known[key] = ask(self.model, config, **options)
        return self.known[key]


def given(entry: Entry, counter: Counter, budget: Budget | None = None, room: float | None = None) -> Given:
    """What an arm comes to as it stands. Raises: LayerpeftError."""
    recipe, found = entry.recipe, counter.cost(entry)
    steps = recipe["max_steps"] if recipe["max_steps"] > 0 else None
    each = found.flops * recipe["gradient_accumulation_steps"]
    operations = float(each * steps) if steps else None
    took = {
        "memory": found.peak_bytes,
        "parameters": found.trainable,
        "time": operations or each * recipe["num_train_epochs"],
    }
    return Given(
        entry.count,
        recipe.config.r if _ranks(recipe) else None,
        steps,
        float(recipe["learning_rate"]),
        found.peak_bytes,
        found.trainable,
        operations,
        took[budget.kind] / room if budget is not None and room else None,
    )


def room_of(own: Entry, counter: Counter, budget: Budget) -> float:
    """What every arm may take; of time where a recipe counts epochs: operations of a step, times those.
    Raises: RecipeError for a number of operations where the number of steps is not known."""
    recipe = own.recipe
    if budget.amount is not None:
        if budget.kind == "time" and recipe["max_steps"] <= 0:
            raise RecipeError(
                "--budget: a number of operations needs max_steps, which says how many steps the recipe's are"
            )
        return float(budget.amount)
    if budget.kind == "parameters":
        return float(counter.trainable(own))
    found = counter.cost(own)
    if budget.kind == "memory":
        return float(found.peak_bytes)
    steps = recipe["max_steps"] if recipe["max_steps"] > 0 else recipe["num_train_epochs"]
    return float(found.flops * recipe["gradient_accumulation_steps"] * steps)


def fitted(entry: Entry, counter: Counter, budget: Budget, room: float) -> Entry | Left:
    """The arm at the most that the budget holds: of time by its steps; else by its rank, and by the number of its layers where it
    has no rank, or the rank is at its end. `last` and `first` take as many layers as memory holds before their rank grows.
    """
    try:
        return _timed(entry, counter, room) if budget.kind == "time" else _Fitting(entry, counter, budget, room).found()
    except LayerpeftError as error:
        return Left(entry.arm, "; ".join(problem.text for problem in error.problems))


def _timed(entry: Entry, counter: Counter, room: float) -> Entry:
    """With more or fewer steps; the warm-up is the same share of them."""
    recipe = entry.recipe
    each = counter.cost(entry).flops * recipe["gradient_accumulation_steps"]
    values, before = dict(recipe.values), recipe["max_steps"]
    if before <= 0:
        values["num_train_epochs"], ratio = room / each, room / each / recipe["num_train_epochs"]
    else:
        values["max_steps"] = steps = int(room / each)
        if steps < 1:
            raise RecipeError(f"one step takes {each:.3g} operations, and the budget is {room:.3g}")
        ratio = steps / before
    if (warm := recipe["warmup_steps"]) and warm >= 1:
        values["warmup_steps"] = round(warm * ratio)
    return replace(entry, recipe=replace(recipe, values=values))


@dataclass(frozen=True)
class _Fitting:
    """One arm and what it may take."""

    entry: Entry
    counter: Counter
    budget: Budget
    room: float

    def size(self, entry: Entry) -> int:
        return self.counter.cost(entry).peak_bytes if self.budget.kind == "memory" else self.counter.trainable(entry)

    def fits(self, entry: Entry) -> bool:
        return self.size(entry) <= self.room

    def found(self) -> Entry:
        """Raises: RecipeError where it cannot fit."""
        if not self.fits(self.entry):
            return self.shrunk()
        entry, own = self.entry, self.entry.recipe.config.r
        if not _ranks(entry.recipe):
            return self.counted(entry, entry.count or 1)
        if entry.spreads and self.budget.kind == "memory":
            entry = self.counted(entry, entry.count or 1)
        cap = highest(entry, self.counter)
        full = self.at(entry, cap)
        if not self.fits(full):
            return self.ranked(entry, own, cap) or entry
        full = self.counted(full, full.count or 1)  # a rank means no more than this one, layers may
        if full.again is None or (full.count or 1) >= full.most:
            return full
        return self.ranked(full.at((full.count or 1) + 1), 1, cap) or full

    def shrunk(self) -> Entry:
        entry, rank = self.entry, self.entry.recipe.config.r
        ranks = _ranks(entry.recipe)
        if ranks and (found := self.ranked(entry, 1, rank)):
            return found
        least = self.at(entry, 1) if ranks else entry
        one = least.at(1) if least.again is not None else least
        if not self.fits(one):
            what = f"{one.count} {one.unit}s" if one.count != 1 else f"one {one.unit}"
            at = " at rank 1" if ranks else ""
            takes = "takes" if self.budget.kind == "memory" else "is"
            raise RecipeError(
                f"{what}{at}, with what trains besides, {takes} {self.budget.text(self.size(one))}, and the budget is "
                f"{self.budget.text(self.room)}"
            )
        fewer = self.counted(one, 1, (least.count or 1) - 1)
        return self.ranked(fewer, 1, rank) or fewer if ranks else fewer

    def ranked(self, entry: Entry, low: int, high: int) -> Entry | None:
        rank = largest(lambda r: self.size(self.at(entry, r)), low, max(low, high), self.room)
        return None if rank is None else self.at(entry, rank)

    def at(self, entry: Entry, rank: int) -> Entry:
        """At a rank that is counted from the arm's own."""
        return replace(entry, recipe=at_rank(self.entry.recipe, rank))

    def counted(self, entry: Entry, low: int, high: int | None = None) -> Entry:
        """With as many layers as fit, where `low` do; as it is where its number is fixed."""
        if entry.again is None:
            return entry
        count = largest(
            lambda n: self.size(entry.at(n)), low, max(low, entry.most if high is None else high), self.room
        )
        return entry if count in (None, entry.count) else entry.at(count or 1)


def at_rank(recipe: Recipe, rank: int) -> Recipe:
    """A recipe with another rank. A lower one keeps the scale of its update; of a higher one `lora_alpha` stays, so that the scale
    falls, and its learning rate need not (LoRA, arXiv 2106.09685)."""
    config = recipe.config
    if rank == config.r:
        return recipe
    said = config.at_rank(rank) if rank < config.r else {"r": rank}
    said = {k: v for k, v in said.items() if k == "r" or v and v != getattr(config, k)}
    return replace(recipe, block={**recipe.block, **said}, config=config.changed(**said))


def highest(entry: Entry, counter: Counter) -> int:
    """The highest rank that means more than a lower one: the narrowest side of what trains, or the arm's own."""
    targets = entry.recipe.config.examine(counter.model).targets
    return max([entry.recipe.config.r, min((min(t.shape[-2:]) for t in targets if len(t.shape) > 1), default=1)])


def _ranks(recipe: Recipe) -> bool:
    return bool(recipe.config.works_by.ranks(recipe.config.r))


def largest(size: Callable[[int], float], low: int, high: int, room: float) -> int | None:
    """The largest number from `low` to `high` whose size, which grows with it, is within `room`, or is near it; None where there is
    none. Sizes are close to straight lines, along which it is looked for, with a halving in between."""
    below = size(low)
    if below > room:
        return None
    if low == high or (above := size(high)) <= room:
        return high
    straight = True
    while high - low > 1 and below < NEAR * room:
        guess = low + int((high - low) * (room - below) / (above - below)) if straight else (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        if (found := size(middle)) <= room:
            low, below = middle, found
        else:
            high, above = middle, found
        straight = not straight
    return low
