"""`Select`: how layers are to be picked, as asked. `Selection`: which were, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from layerpeft import registry
from layerpeft.errors import LayerpeftError, Problems, SelectionError, unknown
from layerpeft.scores import Scores

SCORERS = "layerpeft.scorers"
PICKS = "layerpeft.picks"
DEFAULT_BATCHES = 8


@dataclass(frozen=True)
class Select:
    """How layers are picked. Every field means what the table in the README says; `options` are the scorer's and the rule's.

    Build it with `Select.parse`, which takes the short forms (a layer grammar, a dict) as well.
    """

    by: str | Scores = "depth"
    keep: int | float | str | None = None
    pick: str | None = None
    layers: Any = "all"
    exclude: Any = None
    reselect_steps: int | None = None
    num_batches: int | None = None
    seed: int = 0
    stack: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> Select:
        """A `Select` from a layer grammar (string, int, list), a dict or a `Select`.

        Raises: SelectionError naming every problem at once.
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
        problems.raise_if_any(SelectionError)
        return parsed

    @property
    def is_all(self) -> bool:
        """True where nothing is left out: plain PEFT."""
        return self.by == "depth" and self.layers == "all" and self.exclude is None and self.keep is None

    @property
    def rule(self) -> str:
        """The name of the rule: `pick`, `split` for `keep: auto`, otherwise `top`."""
        return self.pick or ("split" if self.keep == "auto" else "top")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe would write it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        if isinstance(self.by, Scores):
            plain["by"] = self.by.to_dict()
        return {k: v for k, v in plain.items() if v is not None} | dict(self.options)


@dataclass(frozen=True)
class Selection:
    """The layers and targets chosen, out of which, and why. Plain data; survives JSON."""

    layers: tuple[int, ...]
    targets: tuple[str, ...]
    num_layers: int
    layer_names: tuple[str, ...]
    stack: str
    fingerprint: str
    why: str
    scores: Scores | None = None
    select: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["scores"] = self.scores.to_dict() if self.scores else None
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """Raises: SelectionError when a key is missing."""
        missing = [f.name for f in fields(cls) if f.name not in data and f.name not in ("scores", "select")]
        if missing:
            raise SelectionError(f"a recorded selection needs the keys {', '.join(missing)}")
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in cls.__dataclass_fields__
        }
        if given.get("scores") is not None:
            given["scores"] = Scores.from_dict(given["scores"])
        return cls(**given)


@dataclass
class LiveRecord:
    """What hangs on a live adapter's config: the choice (None while it is pending), and what has trained so far."""

    config: dict[str, Any]
    method: str = "lora"
    selection: Selection | None = None
    steps_trained: dict[int, int] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    new_tensors: tuple[str, ...] = ()
    idle_experts: tuple[str, ...] = ()


def layer_numbers(value: Any, count: int) -> tuple[int, ...]:
    """The layers that a grammar names in a stack of `count`, ascending.

    `3`, `-1`, `[3, 7]`, `"8-15"`, `"first:2"`, `"last:25%"`, `"first:10+last:2"`, `"stride:4"`, `"all"`.
    Raises: SelectionError for what is out of range, matches nothing, or cannot be read.
    """
    problems = Problems(f"layers of a stack of {count}")
    found: set[int] = set()
    for part in _parts(value):
        found.update(_part(part, count, problems))
    problems.raise_if_any(SelectionError)
    if not found:
        raise SelectionError(f"layers: {value!r} names no layer")
    return tuple(sorted(found))


def how_many(keep: Any, candidates: int) -> int | None:
    """Number of layers that `keep` means among `candidates`; None for "auto". Shares are rounded half up, at least 1.

    Raises: SelectionError when more are asked for than there are.
    """
    if keep is None or keep == "auto":
        return None
    share = _share(keep)
    number = max(1, math.floor(share * candidates + 0.5)) if share is not None else int(keep)
    if number > candidates:
        raise SelectionError(f"keep: {keep} layers are asked for, and there are {candidates} to choose from")
    return number


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [p.strip() for p in re.split(r"[+,]", value)]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, Sequence):
        return [p for item in value for p in _parts(item)]
    return [value]


def _part(part: Any, count: int, problems: Problems) -> range:
    if isinstance(part, int) and not isinstance(part, bool):
        return _index(part, part, count, problems)
    text = str(part)
    if text == "all":
        return range(count)
    if re.fullmatch(r"-?\d+", text):
        return _index(int(text), part, count, problems)
    if between := re.fullmatch(r"(\d+)-(\d+)", text):
        low, high = int(between[1]), int(between[2])
        if low > high:
            problems.add(f"{part!r} runs backwards; write {high}-{low}")
        elif high >= count:
            problems.add(f"{part!r} is out of range; layers are 0 to {count - 1}")
        return range(low, min(high + 1, count))
    if ends := re.fullmatch(r"(first|last):(\d+(?:\.\d+)?)(%?)", text):
        number = _end_count(ends[2], ends[3], count, part, problems)
        return range(number) if ends[1] == "first" else range(count - number, count)
    if (stride := re.fullmatch(r"stride:(\d+)", text)) and int(stride[1]) >= 1:
        return range(0, count, int(stride[1]))
    problems.add(
        f"cannot read {part!r}; write 3, -1, [3, 7], '8-15', 'first:2', 'last:25%', 'first:10+last:2', 'stride:4', 'all'"
    )
    return range(0)


def _index(index: int, part: Any, count: int, problems: Problems) -> range:
    if -count <= index < count:
        return range(index % count, index % count + 1)
    problems.add(f"{part} is out of range; layers are 0 to {count - 1} (or -1 to -{count})")
    return range(0)


def _end_count(number: str, percent: str, count: int, part: Any, problems: Problems) -> int:
    value = float(number)
    if percent and not 0 < value <= 100 or not percent and (value != int(value) or value < 1):
        problems.add(f"{part!r} takes a whole number from 1, or a share above 0 % up to 100 %")
        return 0
    found = max(1, math.floor(count * value / 100 + 0.5)) if percent else int(value)
    if found > count:
        problems.add(f"{part!r} asks for {found} layers of {count}")
        return 0
    return found


def _share(keep: Any) -> float | None:
    """The share that `keep` means, or None for a count."""
    if isinstance(keep, str):
        return float(keep.rstrip("%")) / 100
    return keep if isinstance(keep, float) and keep < 1 else None


def _check_keep(keep: Any, problems: Problems) -> Any:
    offer = "a whole number from 1, a share between 0 and 1 (0.25, '25%'), or 'auto'"
    if keep is None or keep == "auto":
        return keep
    if isinstance(keep, str):
        if re.fullmatch(r"\d+", keep):
            keep = int(keep)
        elif not re.fullmatch(r"\d+(\.\d+)?%", keep) or not 0 < float(keep[:-1]) < 100:
            problems.add(f"keep: {keep!r} is not {offer}; for everything write select: all")
            return None
        else:
            return keep
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        problems.add(f"keep: {keep!r} is not {offer}")
    elif isinstance(keep, float) and not 0 < keep < 1:
        problems.add(
            f"keep: {keep} has two meanings; write 1 for one layer, or select: all for every layer"
            if keep == 1.0
            else f"keep: {keep} is not {offer}"
        )
    elif isinstance(keep, int) and keep < 1:
        problems.add(f"keep: {keep} is not {offer}")
    else:
        return keep
    return None


def _parse(cls: type[Select], given: dict[str, Any], problems: Problems) -> Select:
    own = {f.name for f in fields(cls)} - {"options"}
    known = {k: _plain(given.pop(k)) for k in list(given) if k in own}
    if not isinstance(known.get("stack"), str | None):
        problems.add(f"stack: {known.pop('stack')!r} is not a name")
    known["keep"] = _check_keep(known.get("keep"), problems)
    by = _check_by(known.get("by", "depth"), problems)
    known["by"] = by
    pick = known.get("pick")
    if pick is not None and pick not in registry.names(PICKS):
        problems.add(unknown("pick", pick, registry.names(PICKS)))
        known["pick"] = None
    for name, least in (("reselect_steps", 1), ("num_batches", 1), ("seed", None)):
        value = known.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or (least and value < least)):
            problems.add(f"{name}: {value!r} is not a whole number{f' from {least}' if least else ''}")
            known.pop(name)
    _check_together(known, problems)
    for name in ("layers", "exclude"):
        if known.get(name) is not None:
            _check_grammar(name, known[name], problems)
    parsed = cls(**known)
    schema = _option_types(by, parsed.rule)
    for name, value in given.items():
        if name not in schema:
            problems.add(unknown("key", name, [*own, *schema]))
        else:
            given[name] = _check_type(name, value, schema[name], problems)
    return cls(**known, options=given)


def _plain(value: Any) -> Any:
    """Sequences of other libraries and ranges as lists of plain numbers, so that the choice can be written down."""
    if isinstance(value, range | tuple | set | frozenset):
        return [_plain(v) for v in sorted(value)] if isinstance(value, set | frozenset) else [_plain(v) for v in value]
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist") and not isinstance(value, str | Scores):
        return value.tolist()
    return value


def _check_by(by: Any, problems: Problems) -> Any:
    if isinstance(by, Scores):
        return by
    if isinstance(by, Path) or (isinstance(by, str) and (by.endswith(".json") or "/" in by)):
        try:
            return Scores.load(by)
        except LayerpeftError as error:
            problems.add(f"by: {error}")
            return "depth"
    if isinstance(by, Mapping):
        try:
            return Scores.from_dict(by)
        except LayerpeftError as error:
            problems.add(f"by: {error}")
            return "depth"
    if by not in registry.names(SCORERS):
        problems.add(unknown("scorer", by, registry.names(SCORERS)) + " A path of saved scores (.json) works too.")
        return "depth"
    return by


def _check_together(known: dict[str, Any], problems: Problems) -> None:
    by, keep, pick = known.get("by"), known.get("keep"), known.get("pick")
    if by != "depth" and keep is None and not problems.items:
        problems.add("keep: missing; say how many layers to keep (a number, a share, or 'auto')")
    if keep == "auto" and pick not in (None, "split"):
        problems.add(f"keep: auto lets the scores decide, so pick is 'split', not {pick!r}")
    if pick == "split" and keep not in (None, "auto"):
        problems.add(f"pick: split decides the number itself; write keep: auto instead of keep: {keep}")


def _check_grammar(name: str, value: Any, problems: Problems) -> None:
    trial = Problems("")
    for part in _parts(value):
        if not isinstance(part, str | int) or isinstance(part, bool):
            trial.add(f"cannot read {part!r} as a layer")
        else:
            _part(part, 10**9, trial)  # only the spelling can be wrong in so deep a stack
    for item in trial.items:
        problems.add(f"{name}: {item}")


def _option_types(by: Any, rule: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(by, str):
        found |= get_type_hints(registry.get(SCORERS, by).Options)
    if rule in registry.names(PICKS):
        found |= get_type_hints(registry.get(PICKS, rule).Options)
    return found


def _check_type(name: str, value: Any, expected: Any, problems: Problems) -> Any:
    allowed = get_args(expected)
    origin = get_origin(expected)
    if origin is tuple:
        if (
            isinstance(value, list | tuple)
            and len(value) == len(allowed)
            and all(isinstance(v, int | float) for v in value)
        ):
            return tuple(value)
        problems.add(f"{name}: {value!r} is not a list of {len(allowed)} numbers")
    elif allowed and all(isinstance(a, str) for a in allowed):
        if value not in allowed:
            problems.add(unknown(f"value for {name}", value, allowed))
    elif expected is bool and not isinstance(value, bool):
        problems.add(f"{name}: {value!r} is not true or false")
    elif expected is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        problems.add(f"{name}: {value!r} is not a whole number from 1")
    elif expected is float and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
        problems.add(f"{name}: {value!r} is not a number above 0")
    return value


def options_of(select: Select, package: str) -> Any:
    """The `Options` of the scorer (or the rule) with the values that `select` gives."""
    name = select.by if package == SCORERS else select.rule
    assert isinstance(name, str)
    kind = registry.get(package, name).Options
    return kind(**{f.name: select.options[f.name] for f in fields(kind) if f.name in select.options})
