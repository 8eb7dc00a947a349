"""What every arm trains: a recipe, its choice of layers, and how the same choice is made with another number of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from layerpeft.errors import LayerpeftError, Problems, RecipeError
from layerpeft.recipe.comparing.arms import AMONG, OWN, PLACES, Arm, among_of
from layerpeft.recipe.comparing.names import DRAW, OURS
from layerpeft.recipe.recipe import Recipe, as_chosen, unpacked
from layerpeft.recipe.trainer import Setup, batches_for
from layerpeft.selection.choose import choose_among, lowest
from layerpeft.selection.examined import Examined
from layerpeft.selection.schedule import schedule_of
from layerpeft.selection.select import Select, Selection
from layerpeft.text import counted, note

Layers = tuple[int, ...]
Choose = Callable[..., Selection]  # of a way to choose
Again = Callable[
    [int], tuple[Layers, Mapping[str, Any]]
]  # of a number of layers: which, and what `select` says of them


@dataclass(frozen=True)
class Entry:
    """One arm, or one draw of it. `select`: what is said of its layers; `count`: of them train at once (None: scores decide);
    `again`: the same choice with another number, up to `most`; `spreads`: its number goes by the memory there is."""

    arm: str
    recipe: Recipe
    layers: Layers
    select: Mapping[str, Any]
    count: int | None
    num_layers: int
    unit: str = "layer"
    most: int = 0
    again: Again | None = None
    spreads: bool = False

    def at(self, count: int) -> Entry:
        """The same with this many layers."""
        assert self.again is not None
        layers, select = self.again(count)
        return replace(self, layers=layers, select=select, count=count)


@dataclass(frozen=True)
class _Ground:
    """What arms that are other choices are made on: the recipe's setup, its model, the targets that it examined there, its own arm,
    and the recipes of arms that are criteria, by name."""

    setup: Setup
    model: nn.Module
    examined: Examined
    own: Entry
    others: Mapping[str, Recipe]

    @property
    def choose(self) -> Choose:
        """What a way to choose means among the recipe's targets."""
        return partial(choice, self.model, self.examined)


def entries_of(setup: Setup, model: nn.Module, arms: Sequence[Arm], others: Mapping[str, Recipe]) -> list[Entry]:
    """Every arm on this model, that of the setup's recipe first; `others`: as `arm_recipes` found them.
    Raises: RecipeError where arms are other choices and there is nothing to choose."""
    recipe = setup.recipe
    examined = recipe.config.examine(model)
    own, kept = _of_recipe(setup, model, _own_name(recipe), recipe, examined)
    choices = [arm for arm in arms if arm.source is None]
    made = (_scheduled if examined.select.is_scheduled else _chosen)(
        _Ground(setup, model, examined, own, others), choices
    )
    if kept is not None and kept.scores is not None:
        own = replace(own, arm=str(kept.scores.by))
    if own.arm in [arm.name for arm in arms] or own.arm.partition(":")[0] == "random":
        own = replace(own, arm=OURS)  # so that it is told apart from them
    found = [own]
    for arm in arms:
        if arm.source is None:
            found += made[arm.name]
        else:
            theirs = transplanted(recipe, others[arm.name])
            found.append(_of_recipe(replace(setup, recipe=theirs), model, arm.name, theirs)[0])
    return [_unpacked(entry) for entry in found]


def transplanted(recipe: Recipe, other: Recipe) -> Recipe:
    """The recipe (as a shorter model may have it) with what `other`, an arm of it, says of how it trains."""
    own = {k: other.values[k] for k in OWN if k in other.values}
    same = {"method": other.method, "select": other.select, "block": other.block, "config": other.config}
    return replace(recipe, values={**recipe.values, **own}, **same)


def choice(model: nn.Module, examined: Examined, select: Select | Mapping[str, Any], batches: Any = None) -> Selection:
    """What a way to choose means among the recipe's targets."""
    parsed = select if isinstance(select, Select) else Select.parse(select)
    return choose_among(model, parsed, examined.layers, examined.targets, batches, costs=examined.costs)


def _own_name(recipe: Recipe) -> str:
    select = recipe.config.choosing
    if select.is_scheduled:
        return f"{select.rule} every {select.reselect_steps}"
    return recipe.select if isinstance(recipe.select, str) else "by place"


def _of_recipe(
    setup: Setup, model: nn.Module, name: str, recipe: Recipe, examined: Examined | None = None
) -> tuple[Entry, Selection | None]:
    """A recipe as it stands; and its choice, where that is made once."""
    looked: Examined = recipe.config.examine(model) if examined is None else examined
    select, size = looked.select, len(looked.layers)
    if select.is_scheduled:
        schedule = schedule_of(select, looked.layers, looked.targets)
        again = partial(_keeping, schedule.pool, select.to_dict())
        keep = _keep(select, looked, schedule.among)
        whole = keep is not None and select.within is None
        entry = Entry(
            name,
            recipe,
            schedule.pool,
            select.to_dict(),
            keep,
            size,
            select.unit,
            len(schedule.among),
            again if whole else None,
        )
        return entry, None
    batches, _ = batches_for(setup, model, recipe.select)
    kept = choice(model, looked, select, batches)
    count = len(kept.layers)
    at_end = kept.layers == tuple(range(size - count, size))  # which can be of more layers, too
    again: Again | None = partial(_nearest_output, kept, at_end) if select.keep is None else None
    most = size if at_end else count
    if kept.scores is not None and select.within is None and select.budget is None:
        plain = {**among_of(select), "by": kept.scores, "pick": "bottom" if select.rule == "bottom" else "top"}
        again, most = partial(_of_choice, partial(choice, model, looked), plain), len(kept.scores.values)
    entry = Entry(name, recipe, kept.layers, as_chosen(recipe, kept), count, size, select.unit, most, again)
    return entry, kept


def _keep(select: Select, examined: Examined, among: Sequence[int]) -> int | None:
    """How many train at a time; of each kind, where they are kept within groups; None where scores decide."""
    if select.keep in (None, "auto"):
        return None
    return int(select.keep) if select.within else len(lowest(select, examined.layers, among))  # type: ignore[arg-type]


def _chosen(ground: _Ground, arms: Sequence[Arm]) -> dict[str, list[Entry]]:
    """The choices of layers beside the recipe's own, of as many layers where none names a number.
    Raises: RecipeError when there is nothing to choose."""
    if not arms:
        return {}
    select, own, choose = ground.examined.select, ground.own, ground.choose
    among = among_of(select)
    keep: Any = len(own.layers)
    everything = choose({**among, "layers": among.get("layers", f"0-{own.num_layers - 1}")}).layers
    if keep == len(everything) and any(arm.keep is None and arm.kind != "all" for arm in arms):
        raise RecipeError(
            f"select: the recipe trains all {keep} {select.unit}s that it may choose from, so there is no choice to compare"
        )
    if select.within is not None and select.keep != "auto":  # as many of each kind, or of each layer
        keep, among = select.keep, among | {"within": select.within}
    return _each(arms, partial(_chosen_as, ground, keep, among, everything))


def _each(arms: Sequence[Arm], make: Callable[[Arm], list[Entry]]) -> dict[str, list[Entry]]:
    """What is made of every arm. Raises: RecipeError with the problems of all of them."""
    found: dict[str, list[Entry]] = {}
    problems = Problems("--arms")
    for arm in arms:
        try:
            found[arm.name] = make(arm)
        except LayerpeftError as error:
            for problem in error.problems:
                problems.add(f"{arm.name}: {problem.text}")
    problems.raise_if_any(RecipeError)
    return found


def _chosen_as(ground: _Ground, keep: Any, among: Mapping[str, Any], everything: Layers, arm: Arm) -> list[Entry]:
    """One of these choices, of `keep` layers, and its draws."""
    if arm.kind == "all":
        return [replace(ground.own, arm="all", **_placed_as(ground.examined.select, everything), again=None)]
    if arm.kind == "random":
        return _draws(ground, {**among, "by": "random", "keep": keep}, arm.draws, len(everything))
    given = {**among, "keep": arm.keep or keep}
    if arm.kind in PLACES:
        given |= {"by": "depth", "pick": "top" if arm.kind == "last" else "bottom"}
    else:
        given["by"] = arm.kind
    entry = _choice_of(ground, arm, given)
    free = arm.keep is None and "within" not in given
    return [replace(entry, most=len(everything), again=entry.again if free else None)]


def _choice_of(ground: _Ground, arm: Arm, given: Mapping[str, Any]) -> Entry:
    batches, setup, choose = None, ground.setup, ground.choose
    if arm.scores:
        theirs = transplanted(setup.recipe, ground.others[arm.name])
        batches, _ = batches_for(replace(setup, recipe=theirs), ground.model, given)
    kept = choose(given, batches)
    by = {**given, "by": kept.scores} if arm.scores and kept.scores is not None else given
    again = partial(_of_choice, choose, by)
    placed = _placed_as(Select.parse(given), kept.layers)
    return replace(ground.own, arm=arm.name, **placed, again=again, spreads=arm.kind in ("last", "first"))


def _scheduled(ground: _Ground, arms: Sequence[Arm]) -> dict[str, list[Entry]]:
    """As `_chosen`, of layers that change while training: random arms draw as many of them, as often; others stay as they are.
    Raises: RecipeError where the number of layers at a time is left to the scores."""
    select, own = ground.examined.select, ground.own
    if own.count is None and any(arm.keep is None and arm.kind != "all" for arm in arms):
        raise RecipeError(
            f"select: with keep: {select.keep or 'none'} the number of layers changes between windows, and the arms need one; "
            "compare with keep: N"
        )
    said = ("by", "pick", "rescore_steps", "memory", "decay", *select.options)
    clock = {k: v for k, v in select.to_dict().items() if k not in said}
    return _each(arms, partial(_scheduled_as, ground, clock))


def _scheduled_as(ground: _Ground, clock: Mapping[str, Any], arm: Arm) -> list[Entry]:
    """One of these, by what the recipe's own says of when and among what layers change."""
    select, own, pool = ground.examined.select, ground.own, ground.own.layers
    if arm.kind == "random":
        uniform = [{**clock, "pick": "uniform", "seed": select.seed + s} for s in range(1, arm.draws + 1)]
        return [
            replace(own, arm=f"{DRAW}{s}", select=how, again=own.again and partial(_keeping, pool, how))
            for s, how in enumerate(uniform, 1)
        ]
    if arm.kind == "all":
        return [replace(own, arm="all", **_placed_as(select, pool), again=None)]
    among = {k: clock[k] for k in (*AMONG, "within") if k in clock}
    pick = {"pick": "bottom"} if arm.kind == "first" else {"pick": "top"}
    given = {**among, "by": "depth" if arm.kind in PLACES else arm.kind, "keep": arm.keep or own.count, **pick}
    entry = _choice_of(ground, arm, given)
    return [entry if arm.keep is None and select.within is None else replace(entry, again=None)]


def _placed_as(select: Select, layers: Layers) -> dict[str, Any]:
    """What an entry says of a choice by place."""
    placed = {"layers": list(layers), "stack": select.stack, "unit": select.unit}
    return {"layers": layers, "select": placed, "count": len(layers)}


def _keeping(pool: Layers, select: Mapping[str, Any], count: int) -> tuple[Layers, Mapping[str, Any]]:
    return pool, {**select, "keep": count}


def _nearest_output(kept: Selection, at_end: bool, count: int) -> tuple[Layers, Mapping[str, Any]]:
    layers = tuple(range(kept.num_layers))[-count:] if at_end else kept.layers[-count:]
    return layers, kept.placed | {"layers": list(layers)}


def _of_choice(choose: Choose, given: Mapping[str, Any], count: int) -> tuple[Layers, Mapping[str, Any]]:
    kept = choose({**given, "keep": count})
    return kept.layers, kept.placed


def _draws(ground: _Ground, select: Mapping[str, Any], number: int, most: int) -> list[Entry]:
    """`number` random choices, no two alike. Raises: RecipeError when there are not that many."""
    found: dict[Layers, int] = {}
    whole = math.inf if "within" in select else math.comb(most, int(select["keep"]))
    for seed in range(100 * number if whole >= number else 0):
        found.setdefault(ground.choose({**select, "seed": seed}).layers, seed)
        if len(found) == number:
            drawn = (({**select, "seed": seed}, layers) for layers, seed in found.items())
            return [_drawn(ground, how, layers, place, most) for place, (how, layers) in enumerate(drawn, 1)]
    there = whole if whole < number else len(found)
    what = counted(int(select["keep"]), str(select.get("unit") or "layer"))
    raise RecipeError(f"there are only {there} different choices of {what}, not {number}")


def _drawn(ground: _Ground, select: Mapping[str, Any], layers: Layers, place: int, most: int) -> Entry:
    again = None if "within" in select else partial(_of_choice, ground.choose, select)
    placed = _placed_as(Select.parse(select), layers)
    return replace(ground.own, arm=f"{DRAW}{place}", **placed, most=most, again=again)


def _unpacked(entry: Entry) -> Entry:
    """An arm in which every layer trains: with nothing frozen there is nothing to pack."""
    recipe, config = entry.recipe, unpacked(entry.recipe.config)
    if len(entry.layers) < entry.num_layers or config is recipe.config:
        return entry
    note(f"quantize_frozen: with all layers trained none is left to pack; the arm {entry.arm} stays in 16 bit")
    kept = {k: v for k, v in recipe.block.items() if k != "quantize_frozen"}
    return replace(entry, recipe=replace(recipe, block=kept, config=config))
