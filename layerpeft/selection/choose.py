"""Model + how to select + batches -> Selection: the one place where scorers and rules meet, for tuners and runner alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from layerpeft.errors import LayerMapError, Problem, ScoreError, SelectionError
from layerpeft.integrations import distributed
from layerpeft.model.costs import Costs, costs_of
from layerpeft.model.layers import LayerMap, Target
from layerpeft.model.load import LENGTH, Load, Work
from layerpeft.selection import plugins
from layerpeft.selection.budget import Budget, Counts, best_within
from layerpeft.selection.draws import seed_within
from layerpeft.selection.grammar import how_many, layer_numbers
from layerpeft.selection.scores import Scores
from layerpeft.selection.scoring import Batches, score
from layerpeft.selection.select import PICKS, Select, Selection, options_of


def choose_among(
    model: nn.Module,
    select: Select,
    layers: LayerMap,
    targets: tuple[Target, ...],
    batches: Batches | None = None,
    progress: bool = True,
    costs: Counts | None = None,
) -> Selection:
    """The layers (or the units that `layers` is a map of) that `select` means, among these targets.

    In several processes the first one's choice is everybody's.

    `costs`: as `weighed` gives them.

    Raises: SelectionError when batches are needed and none are given, or when nothing can be chosen as asked.
    """
    if select.by == "depth" and select.keep is None:
        return make_selection(select, layers, targets, None)
    scores = score(model, select, layers, targets, batches, progress)
    return distributed.from_first(make_selection(select, layers, targets, scores, costs))


def weighed(
    model: nn.Module,
    select: Select,
    layers: LayerMap,
    targets: tuple[Target, ...],
    work: Work,
    traced: Callable[[Budget | None], Counts],
    whole: float = 1.0,
) -> Counts | None:
    """What layers cost, where the choice weighs it; `work`: what is trained of a target; `traced`: what that takes by a trace;
    `whole`: as `Costs` has it.

    Raises: SelectionError for a model of which that cannot be known.
    """
    budget = select.budget
    if select.per is None and budget is None:
        return None
    name, what = ("per" if select.per is not None else "keep"), budget.unit if budget is not None else "operations"
    try:
        if budget is None or budget.of == "time":
            try:
                length = budget.shape.length if budget is not None else LENGTH
                found: Counts = costs_of(model, layers, targets, Load(length=length), work)
            except LayerMapError:  # they do not follow from shapes alone
                found = traced(budget)
        else:
            found = traced(budget)
        return replace(found, whole=whole) if isinstance(found, Costs) else found
    except LayerMapError as error:
        sentence = f"{name}: the {what} of a layer are not known: {error}; write keep as a number, without per"
        raise SelectionError(Problem((name,), sentence)) from error


def candidates(select: Select, layers: LayerMap, targets: tuple[Target, ...]) -> list[int]:
    """Layers that may be chosen: those of the grammar that are not excluded and hold a target.

    Raises: SelectionError when none is left.
    """
    allowed = set(layer_numbers(select.layers, len(layers), unit=layers.unit))
    if select.exclude is not None:
        allowed -= set(layer_numbers(select.exclude, len(layers), unit=layers.unit))
    holding = {t.layer for t in targets}
    found = sorted(allowed & holding)
    if not found:
        raise SelectionError(
            f"no {layers.unit} is left to choose from: layers={select.layers!r} without exclude={select.exclude!r}, "
            f"of the {len(holding)} {layers.unit}s that hold a target"
        )
    return found


def groups(select: Select, layers: LayerMap, among: Sequence[int]) -> dict[str, list[int]]:
    """The candidates that a rule chooses among at a time: all of them, or those of each kind, or of each layer (`within`)."""
    if select.within is None:
        return {"": list(among)}
    found: dict[str, list[int]] = {}
    for i in among:
        found.setdefault(layers.layers[i].kind if select.within == "kind" else layers.block(i).name, []).append(i)
    return found


def joins(select: Select) -> bool:
    """Whether layers that were chosen stay, and others join them, so that more train in the end than `keep` says."""
    return hasattr(plugins.get(PICKS, select.rule), "most")


def lowest(select: Select, layers: LayerMap, among: Sequence[int]) -> list[int]:
    """As many of these candidates as are kept, or may be, those nearest to the input: the costliest choice.

    Raises: SelectionError where there are not so many.
    """
    rule, options = plugins.get(PICKS, select.rule), options_of(select, PICKS)

    def most(count: int) -> int | None:
        keep = how_many(select.keep, count, layers.unit)
        return rule.most(keep or count, count, options) if joins(select) else keep

    return sorted(i for group in groups(select, layers, among).values() for i in group[: most(len(group))])


def make_selection(
    select: Select, layers: LayerMap, targets: tuple[Target, ...], scores: Scores | None, costs: Counts | None = None
) -> Selection:
    """Applies the rule to the scores of the candidates (None: takes all of them); `costs`: as `weighed` gives them.

    Raises: ScoreError for scores of another architecture; SelectionError for a rule that cannot be met.
    """
    among = candidates(select, layers, targets)
    chosen, more = among, ""
    if scores is not None:
        scores.check(layers)
        if select.budget is not None:
            chosen, more = _within(select.budget, among, scores, costs)
        else:
            chosen = []
            for name, group in groups(select, layers, among).items():
                keep = how_many(select.keep, len(group), layers.unit)
                chosen += _picked(select, group, keep, seed_within(select.seed, name), scores, costs)
    held = [t for t in targets if t.layer in set(chosen)]
    asked = select.to_dict() | {"by": scores.by if scores else "depth"}
    return selection_of(layers, held, _why(select, scores, len(chosen), layers) + more, asked, scores)


def _within(budget: Budget, among: list[int], scores: Scores, costs: Counts | None) -> tuple[list[int], str]:
    """The best set that a budget holds, and what it takes."""
    assert costs is not None
    chosen = best_within([scores.values[i] for i in among], among, costs, budget.room(costs))
    return list(chosen), f": {budget.said(chosen, costs)}"


def _picked(
    select: Select, group: list[int], keep: int | None, seed: int, scores: Scores, costs: Counts | None
) -> list[int]:
    """Those of a group that the rule takes."""
    values = [scores.values[i] for i in group]
    if select.per is not None:
        assert isinstance(costs, Costs)
        if min(values) < 0:
            raise ScoreError(f"per: cost divides scores, and some of {scores.by} are negative; choose without it")
        values = [value / costs.added(i) for value, i in zip(values, group, strict=True)]
    rule, options = plugins.get(PICKS, select.rule), options_of(select, PICKS)
    if not hasattr(rule, "joint"):
        picked = rule.pick(values, keep, seed, options)
    elif scores.overlaps:
        picked = rule.joint(values, [[scores.overlaps[i][j] for j in group] for i in group], keep, options)
    else:
        raise SelectionError(
            f"pick: {select.rule} weighs scores against overlaps of layers, which these {scores.by} scores do not hold; score "
            f"again with pick: {select.rule}"
        )
    return [group[i] for i in picked]


def selection_of(
    layers: LayerMap, held: Sequence[Target], why: str, select: Mapping[str, Any], scores: Scores | None = None
) -> Selection:
    """The choice of these targets."""
    return Selection(
        layers=tuple(sorted({t.layer for t in held})),
        targets=tuple(t.name for t in held),
        num_layers=len(layers),
        layer_names=layers.names,
        stack=layers.stack,
        fingerprint=layers.fingerprint,
        why=why,
        scores=scores,
        select=select,
        unit=layers.unit,
    )


def _why(select: Select, scores: Scores | None, chosen: int, layers: LayerMap) -> str:
    count = f"{len(layers)} {layers.unit}s"
    if scores is None:
        return f"{chosen} of {count}, by place: {select.layers!r}" + (
            f" without {select.exclude!r}" if select.exclude is not None else ""
        )
    batches = scores.origin.get("num_batches")
    data = f", {batches} batch{'es' if batches != 1 else ''}" if batches else ""
    within = f", within each {select.within}" if select.within else ""
    by = scores.by if select.per is None else f"{scores.by} over {select.per}"
    return f"{chosen} of {count}, by {by} (pick: {select.rule}{within}{data})"
