"""A case: one YAML file that says what is measured. Everything wrong with it is reported at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args

from layerpeft.errors import ConfigError, Problems, unknown
from layerpeft.recipe.yaml import parse
from layerpeft.selection import plugins
from layerpeft.selection.typecheck import complaint, settings_of

CASES = Path(__file__).parent / "cases"
RESULTS = Path(__file__).parent / "results"
KINDS = "benchmarks.kinds"
NEEDS = ("accelerator",)
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """What is measured: a kind (one file of `kinds/`) and its options. `place` orders the report."""

    name: str
    title: str
    kind: str
    about: str
    place: int
    needs: str | None
    options: Any
    given: Mapping[str, Any]


def names(folder: Path = CASES) -> list[str]:
    """The names of the cases in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(source: str, folder: Path = CASES) -> Case:
    """A case by its name, or by the path of its file.

    Raises: ConfigError that names every problem, and for an unknown name the nearest one.
    """
    path = Path(source) if source.endswith((".yaml", ".yml")) else folder / f"{source}.yaml"
    if not path.is_file():
        raise ConfigError(unknown("case", source, names(folder)))
    problems = Problems(f"case {path.stem}")
    document = parse(path.read_text(encoding="utf-8"))
    for fault in document.faults:
        problems.add(str(fault))
    problems.raise_if_any(ConfigError)
    found = _case(path.stem, dict(document.data), problems)
    problems.raise_if_any(ConfigError)
    assert found is not None
    return found


def kind_of(case: Case) -> ModuleType:
    """The file that measures, tabulates and draws a case."""
    return plugins.get(KINDS, case.kind)


def _case(name: str, given: dict[str, Any], problems: Problems) -> Case | None:
    rest = dict(given)
    head = {key: rest.pop(key, None) for key in ("title", "kind", "about", "place", "needs")}
    for key in ("title", "kind", "about"):
        if not isinstance(head[key], str):
            problems.add(f"{key}: expected text, got {head[key]!r}")
    if not isinstance(head["place"], int):
        problems.add(f"place: expected a whole number, got {head['place']!r}")
    if head["needs"] not in (None, *NEEDS):
        problems.add(f"needs: {unknown('need', head['needs'], NEEDS)}")
    if not isinstance(head["kind"], str):
        return None
    if head["kind"] not in plugins.names(KINDS):
        problems.add(unknown("kind", head["kind"], plugins.names(KINDS)))
        return None
    module = plugins.get(KINDS, head["kind"])
    options = read(module.Options, rest, problems)
    if options is None:
        return None
    module.check(options, problems)
    return Case(name=name, options=options, given=given, **head)


def read(kind: type[T], given: Mapping[str, Any], problems: Problems, where: str = "") -> T | None:
    """A dataclass from plain data; what does not fit goes to `problems`, and None comes back."""
    known, before = settings_of(kind), len(problems.items)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            problems.add(unknown("key", where + key, [where + name for name in known]))
            continue
        nested: list[Any] = [k for k in (known[key].hint, *get_args(known[key].hint)) if dataclasses.is_dataclass(k)]
        if nested and isinstance(value, dict):
            values[key] = read(nested[0], value, problems, f"{where}{key}.")
        elif wrong := complaint(known[key], value):
            problems.add(f"{where}{key}: {wrong}")
        else:
            values[key] = value
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.init and field.name not in given:
            problems.add(f"{where}{field.name}: missing")
    return kind(**values) if len(problems.items) == before else None
