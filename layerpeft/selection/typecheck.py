"""Does a value fit a type hint, and the bounds declared beside it?

Asked of TRL's, transformers' and PEFT's own dataclasses, so that no list of ours can age (`complaint`); and of our own, whose
fields are declared with `checked` (`check`).
"""

import dataclasses
import inspect
import math
import re
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from layerpeft.errors import LayerpeftError, Problems, unknown
from layerpeft.errors import hint as near_name

_NONE = type(None)
LARGEST = 2**63 - 1  # a whole number that every library takes


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a value has to be besides of its type: ends that belong to it (`least`, `most`) or do not (`above`, `below`), or one of
    `choices`; `words` say its type better than the hint does ("a list of names"). `of`: values of other fields, one of which it
    takes for this one to mean something."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    words: str = ""
    of: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a dataclass: its type, its default, the values it may take where the class lists them, and its bounds."""

    hint: Any
    default: Any = None
    choices: tuple[Any, ...] = ()
    bounds: Bounds | None = None


@cache
def settings_of(kind: type) -> Mapping[str, Setting]:
    """The fields of a dataclass that its constructor takes, by name."""
    hints = get_type_hints(kind)
    found = {}
    for item in dataclasses.fields(kind):
        if item.init:
            default = None if item.default is dataclasses.MISSING else item.default
            choices = tuple(item.metadata.get("choices") or ())
            found[item.name] = Setting(hints[item.name], default, choices, item.metadata.get("bounds"))
    return found


def checked(default: Any, help: str = "", **bounds: Any) -> Any:
    """A field of a dataclass that `check` looks at: `k: int = checked(8, least=1)`; the bounds are those of `Bounds`."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": Bounds(**bounds)})


def check(kind: type, values: Mapping[str, Any], problems: Problems, sign: str = "=", every: bool = False) -> None:
    """Adds a sentence for every value that is not what its field declares; `sign` stands between a name and its value.

    Fields that are not declared with `checked` may hold anything; with `every` they have to fit their hint where that is a number,
    a truth value, a `Literal`, a list or a tuple: whole numbers from 1, others above 0.
    """
    for name, (hint, bounds) in _declared(kind, every).items():
        if name not in values or _holds(hint, bounds, values[name]):
            continue
        first, *rest = _parts(hint)
        texts = bounds.choices or (map(str, get_args(first)) if get_origin(first) is Literal and not rest else ())
        told = f"{name}{sign}{values[name]!r} is not {_wanted(first, bounds)}"
        problems.add(unknown(name, values[name], texts) if texts else told, name)


def unused(kind: type, given: Mapping[str, Any], problems: Problems) -> None:
    """Adds a sentence for every value given that means nothing beside the others, by the `of` of its field; a false flag asks for
    nothing."""
    settings = settings_of(kind)
    for name in (n for n in given if n in settings and given[n] is not False):
        for other, fit in (bounds.of if (bounds := settings[name].bounds) else {}).items():
            if (value := given.get(other, settings[other].default)) not in fit:
                wanted, found = (f"{other}: {_yaml(v)}" for v in (" or ".join(map(_yaml, fit)), value))
                problems.add(f"{name}: is of {wanted}, not of {found}; take it out", name)
                break


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def _declared(kind: type, every: bool) -> Mapping[str, tuple[Any, Bounds]]:
    if every:
        return {n: (s.hint, bounds) for n, s in settings_of(kind).items() if (bounds := s.bounds or _implied(s.hint))}
    marked = [f.name for f in dataclasses.fields(kind) if "bounds" in f.metadata]
    owners = {n: next(c for c in kind.__mro__ if n in inspect.get_annotations(c)) for n in marked}
    found = {n: settings_of(owner)[n] for n, owner in owners.items()}  # the hints of a subclass may be out of reach
    return {n: (s.hint, s.bounds) for n, s in found.items() if s.bounds}


def _implied(hint: Any) -> Bounds | None:
    first, *rest = _parts(hint)
    if rest or (get_origin(first) or first) not in (int, float, bool, Literal, list, tuple):
        return None
    return Bounds(least=1 if first is int else None, above=0 if first is float else None)


def _holds(hint: Any, bounds: Bounds, value: Any) -> bool:
    if isinstance(value, tuple) or isinstance(value, set) and get_origin(_parts(hint)[0]) is list:
        value = list(value)
    if not fits(hint, value) or value is not None and bounds.choices and value not in bounds.choices:
        return False
    if not isinstance(value, int | float):
        return True
    low = (bounds.least is None or value >= bounds.least) and (bounds.above is None or value > bounds.above)
    return low and (bounds.most is None or value <= bounds.most) and (bounds.below is None or value < bounds.below)


def _wanted(first: Any, bounds: Bounds) -> str:
    text = bounds.words or describe(first) + (" numbers" if get_origin(first) is tuple else "")
    for word, end in (
        ("from", bounds.least),
        ("above", bounds.above),
        ("to" if bounds.above is None else "and at most", bounds.most),
        ("to below" if bounds.above is None else "and below", bounds.below),
    ):
        text += f" {word} {end}" if end is not None else ""
    return text


def _parts(hint: Any) -> list[Any]:
    """What a union is made of, but for None."""
    whole = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [p for p in whole if p is not _NONE]


def read_fields(kind: type, data: Any, error: type[LayerpeftError], what: object) -> dict[str, Any]:
    """The fields of a dataclass in plain data that was read back. Raises: `error` naming those that are of another type."""
    if not isinstance(data, Mapping):
        raise error(f"{what}: expected a mapping, got {_show(data)}")
    known = settings_of(kind)
    found = {k: v for k, v in data.items() if k in known}
    wrong = [f"{k}: {sentence}" for k, v in found.items() if (sentence := complaint(known[k], v))]
    if wrong:
        raise error(f"{what}: {'; '.join(wrong)}")
    return found


def complaint(setting: Setting, value: Any) -> str | None:
    """What is wrong with a value, as the end of a sentence ("expected …, got …"), or None when it fits."""
    if fits(setting.hint, value) and (not setting.choices or value is None or value in setting.choices):
        return None
    wanted = f"one of {', '.join(map(str, setting.choices))}" if setting.choices else describe(setting.hint)
    advice = _advice(setting.hint, value)
    near = near_name(value, map(str, setting.choices)) if isinstance(value, str) else ""
    return f"expected {wanted}, got {_show(value)}" + (f"; {advice}" if advice else near and f".{near}")


def fits(hint: Any, value: Any) -> bool:
    """True when plain data from YAML is what the hint asks for: no text for numbers, no booleans for numbers, all finite."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is _NONE:
        return value is None
    if origin in (Union, types.UnionType):
        enums = [p for p in parts if _is_enum(p)]
        if enums and isinstance(value, str):  # an Enum beside str lists what the text may be
            return any(fits(e, value) for e in enums)
        return any(fits(p, value) for p in parts)
    if origin is Literal:
        return any(_literal(p, value) for p in parts)
    if origin in (list, Sequence) or hint is list:
        return isinstance(value, list) and all(fits(parts[0], v) for v in value) if parts else isinstance(value, list)
    if origin is tuple or hint is tuple:
        if not isinstance(value, list) or not parts:
            return isinstance(value, list)
        wanted = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        return len(value) == len(wanted) and all(fits(p, v) for p, v in zip(wanted, value, strict=True))
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return isinstance(value, dict) and (not parts or all(fits(parts[1], v) for v in value.values()))
    return _fits_class(hint, value)


def _fits_class(hint: Any, value: Any) -> bool:
    if _is_enum(hint):
        return any(value == member.value for member in hint)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float) and (isinstance(value, bool) or isinstance(value, int) and abs(value) > LARGEST):
        return False
    if hint is int:
        return isinstance(value, int)
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        known = settings_of(hint)
        return isinstance(value, dict) and all(k in known and fits(known[k].hint, v) for k, v in value.items())
    return isinstance(hint, type) and isinstance(value, hint)


def describe(hint: Any) -> str:
    """A hint in words: "a whole number", "true or false", "one of no, steps, epoch"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        enums = [p for p in parts if _is_enum(p)]
        rest = [p for p in parts if p not in enums and not (enums and p is str)]
        rest.sort(key=lambda p: p is _NONE)
        return " or ".join(dict.fromkeys(describe(p) for p in [*enums, *rest]))
    if origin is Literal:
        return "one of " + ", ".join("false" if p is False else str(p) for p in parts)
    if _is_enum(hint):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if origin in (list, Sequence) or hint is list:
        return "a list" + (f" of {describe(parts[0])}" if parts and parts[0] is not Any else "")
    if origin is tuple:
        return f"a list of {len(parts)}"
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return "a mapping"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"a mapping with {', '.join(settings_of(hint))}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", _NONE: "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def build(hint: Any, value: Any) -> Any:
    """The value as a constructor wants it: mappings turned into the dataclass that the hint names, where it names one."""
    parts = (hint, *get_args(hint))
    kinds = [p for p in parts if dataclasses.is_dataclass(p) and isinstance(p, type)]
    if isinstance(value, dict) and kinds and dict not in parts:
        return kinds[0](**{k: build(settings_of(kinds[0])[k].hint, v) for k, v in value.items()})
    return value


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _literal(allowed: Any, value: Any) -> bool:
    if isinstance(allowed, str) and "[" in allowed and isinstance(value, str):  # 'pissa_niter_[number of iters]'
        return re.fullmatch(re.escape(allowed[: allowed.index("[")]) + r"\d+", value) is not None
    return type(allowed) is type(value) and allowed == value


def _advice(hint: Any, value: Any) -> str:
    """How to write what was probably meant."""
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    if isinstance(value, str):
        text = value.strip()
        if bool in kinds and text.lower() in ("on", "off", "yes", "no", "y", "n", "true", "false"):
            return f"write `{'true' if text.lower() in ('on', 'yes', 'y', 'true') else 'false'}` (without quotes)"
        if kinds & {int, float}:
            if re.fullmatch(r"0\d+", text):
                return f"a number with a leading zero means eight in one YAML and ten in another: write {int(text)}"
            if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
                return "take the quotes away"
            if re.fullmatch(r"\d+,\d+", text):
                return f"write the decimals with a point: {text.replace(',', '.')}"
        if list in {get_origin(k) or k for k in kinds} and str not in kinds:
            return f"write a list: [{text}]"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"whole numbers end at {LARGEST:,}"
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool) and str in kinds:
        return f"put it in quotes: '{value}'"
    return ""


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
