"""Which layers are taken out of a model: `drop`, in the words of `select`.

`keep` says how many stay, of all there are, and `by` and `pick` which; `layers` and `exclude` name those that may go. Without
`keep` they all go. FinerCut (arXiv 2405.18218) is `{by: removal, keep: 75%}`, with `greedy: true` its search, with
`unit: sublayer` its units, and with `layers: last:60%` the layers that its script leaves in peace.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from layerpeft.errors import LayerpeftError, Problem, Problems, SelectionError
from layerpeft.model.layers import LayerMap, Target, layer_map
from layerpeft.model.shorten import shortened, silence
from layerpeft.model.units import in_units
from layerpeft.selection import plugins
from layerpeft.selection.choose import candidates, choose_among, selection_of
from layerpeft.selection.grammar import how_many
from layerpeft.selection.scores import Scores
from layerpeft.selection.scoring import Batches, live_only, needs
from layerpeft.selection.select import SCORERS, Select, Selection, Unit

DEFAULT = "removal"
UNITS = ("layer", "sublayer")
# what is of layers that train
OF_TRAINING = (
    "per",
    "reselect_steps",
    "rescore_steps",
    "warmup_steps",
    "always",
    "memory",
    "decay",
    "state",
    "log_gradients",
)


def parse_drop(value: Any) -> Select:
    """What goes, from a layer grammar or a dict. Raises: SelectionError, ScoreError naming every problem, at keys of `drop`."""
    given = dict(value) if isinstance(value, Mapping) else {"layers": value}
    problems = Problems("drop")
    for name in OF_TRAINING:
        if given.pop(name, None) is not None:
            problems.add(f"{name}: is of layers that train, and drop takes layers out before; take it out", name)
    if isinstance(given.get("keep"), Mapping):
        problems.add("keep: a budget is of a step's time or memory; say how many layers stay: a number, or 75%", "keep")
        del given["keep"]
    unit = given.get("unit", "layer")
    if unit in get_args(Unit) and unit not in UNITS:
        problems.add(f"unit: {unit} cannot be taken out of a model; there are {', '.join(UNITS)}", "unit")
        del given["unit"]
    if given.get("keep") is not None:
        given.setdefault("by", DEFAULT)
    elif not given.keys() & {"layers", "by", "keep"}:
        problems.add("keep: missing; say how many layers stay (keep: 75%), or which go (layers: last:3)", "keep")
    found = Select()
    try:
        found = Select.parse(given)
    except LayerpeftError as error:
        problems.absorb(error)
    if isinstance(found.by, str) and (live_only(found) or plugins.traits(SCORERS, found.by).again_only):
        problems.add(f"by: {found.by} is measured while adapters train, and drop takes layers out before", "by")
    problems.raise_if_any(SelectionError)
    return found


def measures(select: Select) -> bool:
    """Whether what goes hangs on weights or data."""
    return not isinstance(select.by, Scores) and needs(select) != "nothing"


@dataclass(frozen=True)
class Droppable:
    """The units of a model that may go, and how many of them do; None where the scores say it."""

    units: LayerMap
    targets: tuple[Target, ...]
    among: tuple[int, ...]
    count: int | None

    def gone(self, places: tuple[int, ...], select: Select, scores: Scores | None = None) -> Selection:
        """Those at these places, on record."""
        held = [t for t in self.targets if t.layer in places]
        unit, whole = self.units.unit, len(self.units)
        how = f"by {scores.by} (pick: {select.rule})" if scores else "by place"
        asked = select.to_dict() | {"by": scores.by if scores else "depth"}
        return selection_of(self.units, held, f"{len(places)} of {whole} {unit}s taken out, {how}", asked, scores)


def droppable(model: nn.Module, select: Select) -> Droppable:
    """What of a model may go. Raises: LayerMapError, SelectionError, ConfigError."""
    layers = layer_map(model, select.stack)
    units, targets = in_units(layers, select.unit, layers.targets)
    among = tuple(candidates(select, units, targets))
    stay, keep = len(units) - len(among), how_many(select.keep, len(units), select.unit)
    if keep is not None and not stay <= keep < len(units):
        why = f"{stay} of them may not go" if keep < stay else "none would go"
        raise SelectionError(
            Problem(("keep",), f"keep: {select.keep} of {len(units)} {select.unit}s is {keep}, and {why}")
        )
    if select.keep is None and not stay:
        raise SelectionError(Problem(("layers",), f"layers: these are all {len(units)} {select.unit}s; some must stay"))
    count = len(among) if select.keep is None else None if keep is None else len(units) - keep
    return Droppable(units, targets, among, count)


def dropped(model: nn.Module, select: Select, batches: Batches | None = None, progress: bool = True) -> Selection:
    """The layers, or parts of layers, that go. In several processes the first one's choice is everybody's.

    Raises: LayerMapError, SelectionError, ScoreError, ConfigError.
    """
    found = droppable(model, select)
    if found.count == len(found.among):
        return found.gone(found.among, select)
    targets = tuple(t for t in found.targets if t.layer in found.among)
    keep = select.keep if found.count is None else len(found.among) - found.count
    chosen = choose_among(model, replace(select, keep=keep), found.units, targets, batches, progress)
    gone = tuple(i for i in found.among if i not in chosen.layers)
    if not gone:
        raise SelectionError(Problem(("keep",), f"keep: {select.keep}: by these scores none would go"))
    return found.gone(gone, select, chosen.scores)


def drop_layers(model: nn.Module, drop: Any, batches: Batches | None = None) -> tuple[nn.Module, Selection]:
    """The model without what `drop` means, and what that was: a new model around the tensors that stay, or of parts of layers the
    same one, in which they are silenced. Raises: LayerMapError, SelectionError, ScoreError, ConfigError."""
    select = parse_drop(drop)
    found, chosen = droppable(model, select), dropped(model, select, batches)
    if select.unit == "layer":
        return shortened(model, found.units, set(range(len(found.units))) - set(chosen.layers)), chosen
    silence(model, found.units, chosen.layers)
    return model, chosen
