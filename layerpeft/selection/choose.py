"""Model + how to select + batches -> Selection: the one place where scorers and rules meet, for tuners and runner alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from layerpeft.errors import SelectionError
from layerpeft.integrations import distributed
from layerpeft.model.layers import LayerMap, Target
from layerpeft.selection import plugins
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
) -> Selection:
    """The layers (or the units that `layers` is a map of) that `select` means, among these targets.

    In several processes the first one's choice is everybody's.

    Raises: SelectionError when batches are needed and none are given, or when nothing can be chosen as asked.
    """
    if select.by == "depth" and select.keep is None:
        return make_selection(select, layers, targets, None)
    scores = score(model, select, layers, targets, batches, progress)
    return distributed.from_first(make_selection(select, layers, targets, scores))


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


def lowest(select: Select, layers: LayerMap, among: Sequence[int]) -> list[int]:
    """As many of these candidates as are kept, or may be, those nearest to the input: the costliest choice.

    Raises: SelectionError where there are not so many.
    """
    found = groups(select, layers, among).values()
    return sorted(i for group in found for i in group[: how_many(select.keep, len(group), layers.unit)])


def make_selection(select: Select, layers: LayerMap, targets: tuple[Target, ...], scores: Scores | None) -> Selection:
    """Applies the rule to the scores of the candidates (None: takes all of them).

    Raises: ScoreError for scores of another architecture; SelectionError for a rule that cannot be met.
    """
    among = candidates(select, layers, targets)
    chosen = among
    if scores is not None:
        scores.check(layers)
        rule, options, chosen = plugins.get(PICKS, select.rule), options_of(select, PICKS), []
        for name, group in groups(select, layers, among).items():
            keep = how_many(select.keep, len(group), layers.unit)
            picked = rule.pick([scores.values[i] for i in group], keep, seed_within(select.seed, name), options)
            chosen += [group[i] for i in picked]
    held = [t for t in targets if t.layer in set(chosen)]
    asked = select.to_dict() | {"by": scores.by if scores else "depth"}
    return selection_of(layers, held, _why(select, scores, len(chosen), layers), asked, scores)


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
    return f"{chosen} of {count}, by {scores.by} (pick: {select.rule}{within}{data})"
