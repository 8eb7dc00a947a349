"""`Select`: how layers are to be picked, as asked. `Selection`: which were, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from layerpeft.errors import LayerpeftError, Problems, ScoreError, SelectionError, nearest, unknown
from layerpeft.model.heads import HEAD
from layerpeft.model.layers import LayerMap
from layerpeft.model.names import lying_in
from layerpeft.selection import plugins
from layerpeft.selection.budget import Budget
from layerpeft.selection.grammar import check_grammar, checked_keep, heads_placed
from layerpeft.selection.scores import Scores
from layerpeft.selection.typecheck import check, checked, read_fields, settings_of, unused

SCORERS = "layerpeft.scorers"
PICKS = "layerpeft.picks"
GRAMMARS = ("layers", "exclude", "always")  # fields that name layers
DEFAULT_BATCHES = 8
Unit = Literal["layer", "sublayer", "target", "head", "expert"]
WITHIN = Literal["kind", "layer"]


@dataclass(frozen=True)
class Select:
    """How layers are picked. Every field means what the table in docs/layers.md says; `options` are the scorer's and the rule's.

    Build it with `Select.parse`, which takes the short forms (a layer grammar, a dict) as well.
    """

    by: str | Scores = "depth"
    keep: int | float | str | Mapping[str, Any] | None = None
    pick: str | None = None
    per: Literal["cost"] | None = checked(None)
    epochs: float | None = checked(None, above=0)
    layers: Any = "all"
    unit: Unit = checked("layer")
    within: WITHIN | None = checked(None)
    exclude: Any = None
    reselect_steps: int | None = checked(None, least=1)
    rescore_steps: int | Literal["never"] | None = checked(None, least=1)
    warmup_steps: int | None = checked(None, least=1)
    always: Any = None
    memory: Literal["last", "ema", "counts"] | None = checked(None)
    decay: float | None = checked(None, least=0, below=1)
    state: Literal["keep", "clear", "offload"] | None = checked(None)
    log_gradients: bool | None = checked(None)
    num_batches: int | None = checked(None, least=1)
    seed: int = checked(0)
    stack: str | None = checked(None, words="a name")
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> Select:
        """A `Select` from a layer grammar (string, int, list), a dict or a `Select`.

        Raises: SelectionError naming every problem at once; ScoreError where only options of the scorer do not go together.
        """
        if isinstance(value, Select):
            given: dict[str, Any] = {f.name: getattr(value, f.name) for f in fields(cls) if f.name != "options"}
            given.update(value.options)
        elif isinstance(value, Mapping):
            given = dict(value)
            if isinstance(given.get("options"), Mapping):
                given.update(given.pop("options"))
        elif isinstance(value, Scores):
            given = {"by": value}
        else:
            given = {"layers": value}
        problems = Problems("select")
        parsed = _parse(cls, given, problems)
        if len(problems.items) == 1 and isinstance(lone := problems.items[0], LayerpeftError):
            raise lone
        problems.raise_if_any(SelectionError)
        return parsed

    @property
    def is_all(self) -> bool:
        """True where nothing is left out: plain PEFT."""
        whole = self.layers == "all" and self.exclude is None and self.keep is None
        return self.by == "depth" and whole and self.reselect_steps is None and self.unit == "layer"

    @property
    def is_scheduled(self) -> bool:
        """True where layers are chosen again during training."""
        return self.reselect_steps is not None

    @cached_property
    def budget(self) -> Budget | None:
        """What `keep: {time: …}` or `{memory: …}` means; None where `keep` says how many."""
        return Budget.parse(self.keep, Problems("keep")) if isinstance(self.keep, Mapping) else None

    def placed(self, units: LayerMap) -> Select:
        """The same, with heads that are named by `[layer, head]` by their place among these units. Raises: SelectionError."""
        if units.unit != HEAD:
            return self
        given = {n: v for n in GRAMMARS if (v := getattr(self, n)) is not None}
        return replace(self, **{n: heads_placed(v, units, n) for n, v in given.items()})

    @property
    def rule(self) -> str:
        """The name of the rule: `pick`, `split` for `keep: auto`, otherwise `top`."""
        return self.pick or ("split" if self.keep == "auto" else "top")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe would write it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        if isinstance(self.by, Scores):
            plain["by"] = self.by.to_dict()
        if self.unit == "layer":
            del plain["unit"]
        return {k: v for k, v in plain.items() if v is not None} | dict(self.options)


@dataclass(frozen=True)
class Selection:
    """The layers and targets chosen, out of which, and why. Plain data; survives JSON.

    Of a choice below layers, `unit` says of what, and layers are these units everywhere here.
    """

    layers: tuple[int, ...]
    targets: tuple[str, ...]
    num_layers: int
    layer_names: tuple[str, ...]
    stack: str
    fingerprint: str
    why: str
    scores: Scores | None = None
    select: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "layer"

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unit" or self.unit != "layer"}
        plain["scores"] = self.scores.to_dict() if self.scores else None
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the chosen layers."""
        return tuple(self.layer_names[i] for i in self.layers)

    @property
    def in_parts(self) -> bool:
        """Whether layers train in part."""
        return self.unit != "layer"

    @property
    def placed(self) -> dict[str, Any]:
        """What `select` says to choose the same again, by place."""
        unit = {"unit": self.unit} if self.in_parts else {}
        return {"layers": list(self.layers), "stack": self.stack, **unit}

    def by_layer(self, targets: Iterable[str]) -> dict[int, list[str]]:
        """The chosen layers, each with those of the targets that lie in it."""
        targets = list(targets)
        return {i: list(filter(lying_in([self.layer_names[i]]), targets)) for i in self.layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """Raises: SelectionError when a key is missing, or holds something else."""
        missing = [f.name for f in fields(cls) if f.name not in data and f.default is f.default_factory is MISSING]
        if missing:
            raise SelectionError(f"a recorded selection needs the keys {', '.join(missing)}")
        found = read_fields(cls, {**data, "scores": None}, SelectionError, "a recorded selection")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        if data.get("scores") is not None:
            given["scores"] = Scores.from_dict(data["scores"])
        if not all(0 <= i < len(given["layer_names"]) for i in given["layers"]):
            raise SelectionError(f"a recorded selection has layers that it does not name: {given['layers']}")
        return cls(**given)


def _parse(cls: type[Select], given: dict[str, Any], problems: Problems) -> Select:
    own = [f.name for f in fields(cls) if f.name != "options"]
    known = {k: _plain(given.pop(k)) for k in list(given) if k in own}
    given = {k: v for k, v in given.items() if v is not None}  # null: not given
    misspelt = any(nearest(name, own) == "keep" for name in given)  # is one problem, told below
    bare = known.get("keep") is None and not misspelt
    keep = known.get("keep")
    if isinstance(keep, Mapping):
        Budget.parse(keep, problems)
        known["keep"] = dict(keep)
    else:
        known["keep"] = checked_keep(keep, problems)
    known["by"] = by = _check_by(known.get("by", "depth"), problems)
    pick = known.get("pick")
    if pick is not None and pick not in plugins.names(PICKS):
        problems.add(unknown("pick", pick, plugins.names(PICKS)), "pick")
        known["pick"] = None
    _check_unit(known, problems)
    check(cls, {k: v for k, v in known.items() if v is not None}, problems, ": ")
    _check_together(known, bare, problems)
    _check_schedule(known, problems)
    for name in GRAMMARS:
        if known.get(name) is not None:
            check_grammar(name, known[name], problems, pairs=known.get("unit") == HEAD)
    rule = cls(**known).rule
    asked = [(rule, plugins.get(PICKS, rule).Options)]
    if isinstance(by, str):
        asked.insert(0, (by, plugins.get(SCORERS, by).Options))
    schema = {name: setting for _, kind in asked for name, setting in settings_of(kind).items()}
    for name in given:
        if name not in schema:
            problems.add(unknown("key", name, [*own, *schema]), name)
    for name, kind in asked:
        options = _checked_options(name, kind, given, problems)
        if name == by and options is not None:
            _check_measured(known, rule, options, problems)
    tuples = {name for name, setting in schema.items() if (get_origin(setting.hint) or setting.hint) is tuple}
    return cls(**known, options={k: tuple(v) if k in tuples and isinstance(v, list) else v for k, v in given.items()})


def _checked_options(name: str, kind: type, given: Mapping[str, Any], problems: Problems) -> Any:
    """The options of a scorer or a rule; None where something is wrong with one of them, or with them together."""
    wrong, found = len(problems.items), Problems(name)
    check(kind, given, problems, ": ", every=True)
    if len(problems.items) > wrong:
        return None
    unused(kind, given, found)
    try:
        found.raise_if_any(ScoreError if name in plugins.names(SCORERS) else SelectionError)
        return kind(**{n: v for n, v in given.items() if n in settings_of(kind)})
    except LayerpeftError as error:
        problems.absorb(error)
    return None


def _check_measured(known: dict[str, Any], rule: str, options: Any, problems: Problems) -> None:
    """What the scorer asks of batches, and of when it is measured."""
    least, number = least_batches(options), known.get("num_batches")
    if isinstance(number, int) and number < least:
        problems.add(
            f"num_batches: {number} is too few for this score; write num_batches: {least} or more", "num_batches"
        )
    if known.get("reselect_steps") is None or plugins.traits(PICKS, rule).scoreless:
        return
    why = only_before(known["by"], options)
    if why and known.get("rescore_steps") != "never":
        problems.add(f"rescore_steps: {why}; write rescore_steps: never", "rescore_steps")
    if why and known.get("warmup_steps") is not None:
        problems.add(
            f"warmup_steps: {why}, and a warm-up ends with such scores; leave warmup_steps out", "warmup_steps"
        )


def least_batches(options: Any) -> int:
    """How many batches a score takes, by the scorer's own options."""
    return getattr(options, "least_batches", 1)


def only_before(by: str, options: Any) -> str:
    """Why a scorer, with these options, cannot be measured on the batches of training itself; empty where it can."""
    if plugins.traits(SCORERS, by).ordered:
        return f"by: {by} goes by the order of rows, which a trainer shuffles"
    return getattr(options, "only_before", "")


def _plain(value: Any) -> Any:
    """Sequences of other libraries and ranges as lists of plain numbers, so that the choice can be written down."""
    if isinstance(value, range | tuple | list | set | frozenset):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist") and not isinstance(value, str | Scores):
        return value.tolist()
    return value


def _check_by(by: Any, problems: Problems) -> Any:
    if isinstance(by, Scores) or isinstance(by, str) and by in plugins.names(SCORERS):
        return by
    saved = isinstance(by, Path) or isinstance(by, str) and (by.endswith(".json") or "/" in by)
    if saved or isinstance(by, Mapping):
        try:
            return Scores.from_dict(by) if isinstance(by, Mapping) else Scores.load(by)
        except LayerpeftError as error:
            problems.add(f"by: {error}", "by")
            return "depth"
    problems.add(unknown("scorer", by, plugins.names(SCORERS)) + " A path of saved scores (.json) works too.", "by")
    return "depth"


def _check_unit(known: dict[str, Any], problems: Problems) -> None:
    """What is chosen, whether the scorer has a score of it, and what is compared with what."""
    if known.get("unit") is None:
        known.pop("unit", None)
    unit, by = known.get("unit", "layer"), known["by"]
    if isinstance(by, str) and unit in get_args(Unit) and unit not in plugins.traits(SCORERS, by).units:
        able = [name for name in plugins.names(SCORERS) if unit in plugins.traits(SCORERS, name).units]
        traits = plugins.traits(SCORERS, by)
        own, why = " and ".join(f"{u}s" for u in traits.units), f", since {traits.reason}" if traits.reason else ""
        problems.add(f"by: {by} gives a score to {own}, not to {unit}s{why}; to those do {', '.join(able)}", "by")
    if known.get("within") not in get_args(WITHIN):
        return
    if unit == "layer":
        problems.add(
            "within: is of units below a layer, which are compared with those of their kind, or of their layer, alone; give a unit",
            "within",
        )
    if known.get("keep") is None and by == "depth":
        problems.add("within: needs keep, which says how many of each kind, or of each layer", "within")


def _check_together(known: dict[str, Any], bare: bool, problems: Problems) -> None:
    by, keep, pick = known.get("by"), known.get("keep"), known.get("pick")
    again = known.get("reselect_steps") is not None
    if bare and (by != "depth" or pick is not None and again):
        problems.add("keep: missing; say how many layers to keep (a number, a share, or 'auto')", "keep")
    elif bare and again:
        problems.add(
            "keep: missing; say how many layers train at a time (reselect_steps chooses them again and again)", "keep"
        )
    _check_cost(known, problems)
    if isinstance(by, str) and plugins.traits(SCORERS, by).again_only and not again:
        problems.add(
            f"by: {by} is nothing before adapters have trained; say with reselect_steps how often layers are chosen",
            "by",
        )
    if pick is None:
        return
    rule = plugins.traits(PICKS, pick)
    if rule.overlaps:
        able = [name for name in plugins.names(SCORERS) if plugins.traits(SCORERS, name).overlaps]
        if isinstance(by, str) and by not in able:
            problems.add(
                f"pick: {pick} needs overlaps of layers, which by: {' or '.join(able)} measures, not {by}", "pick"
            )
        if again:
            problems.add(
                f"pick: {pick} weighs overlaps in a choice that is made once; leave reselect_steps out", "pick"
            )
    if keep == "auto" and not rule.decides:
        problems.add(f"keep: auto lets the scores decide, so pick is 'split', not {pick!r}", "keep")
    if rule.again_only and not again:
        problems.add(f"pick: {pick} chooses again and again during training; say how often with reselect_steps", "pick")
    if rule.decides and keep not in (None, "auto") and not isinstance(keep, Mapping):
        problems.add(f"pick: {pick} decides the number itself; write keep: auto instead of keep: {keep}", "pick")


def _check_cost(known: dict[str, Any], problems: Problems) -> None:
    """A budget says how many and which, and what a layer costs is of a choice that is made once."""
    keep, pick = known.get("keep"), known.get("pick")
    per = known.get("per") if known.get("per") == "cost" else None  # else it is unknown
    within = isinstance(keep, Mapping)
    budget = "memory" if isinstance(keep, Mapping) and "memory" in keep else "time"
    if within and pick not in (None, "top"):
        problems.add(
            f"pick: a budget (keep: {{{budget}: …}}) takes the best set within it, by pick: top, not {pick!r}", "pick"
        )
    if within and per is not None:
        problems.add(
            f"per: a budget (keep: {{{budget}: …}}) counts what layers cost already; leave one of them out", "per"
        )
    if per is not None and known.get("keep") is None:
        problems.add("per: divides scores, of which the best are kept; say how many with keep", "per")
    if per is not None and pick is not None and plugins.traits(PICKS, pick).scoreless:
        problems.add(f"per: divides scores, and pick: {pick} looks at none", "per")
    if known.get("epochs") is not None and per is None and (not within or budget != "time"):
        problems.add("epochs: is of what layers cost (per: cost, keep: {time: …}); leave it out", "epochs")
    unit = known.get("unit") or "layer"
    weighs = [
        ("keep", within),
        ("per", per is not None),
        ("pick", pick is not None and plugins.traits(PICKS, pick).overlaps),
    ]
    for name in (n for n, on in weighs if on and unit != "layer"):
        problems.add(f"{name}: costs and overlaps are those of layers, not of unit: {unit}", name)
    for name in ("keep",) * within + ("per",) * (per is not None):
        if known.get("reselect_steps") is not None:
            problems.add(f"{name}: costs are weighed in a choice that is made once; leave reselect_steps out", name)


def _check_schedule(known: dict[str, Any], problems: Problems) -> None:
    given = [
        n for n in ("rescore_steps", "warmup_steps", "always", "memory", "decay", "state") if known.get(n) is not None
    ]
    if known.get("reselect_steps") is None:
        for name in given:
            problems.add(f"{name}: is of choices that are made again during training; it needs reselect_steps", name)
        return
    if known.get("decay") is not None and known.get("memory") != "ema":
        problems.add("decay: is of memory: ema", "decay")


def options_of(select: Select, package: str) -> Any:
    """The `Options` of the scorer (or the rule) with the values that `select` gives."""
    name = select.by if package == SCORERS else select.rule
    assert isinstance(name, str)
    kind = plugins.get(package, name).Options
    return kind(**{f.name: select.options[f.name] for f in fields(kind) if f.name in select.options})
