"""YAML as recipes use it: YAML 1.2 scalars, a line number for every key, every fault of the text as a readable sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """A parsed recipe: plain data, the place of each key ("line 7", "command line"), and what is wrong with the text."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def place(self, *path: str | int) -> str:
        """Where a key was written: its own place, else that of the nearest key around it, else ""."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return ""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: `no`, `off` and `010` stay text, `1e-5` is a number, dates stay text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either YAML version would read as something else, and never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _implicit(tag: str, pattern: str, first: str) -> None:
    for side in (_Loader, _Dumper):
        side.add_implicit_resolver(_TAG + tag, re.compile(rf"^(?:{pattern})$"), list(first))


_implicit("null", "~|null|Null|NULL|", "~nN")
_Loader.add_implicit_resolver(_TAG + "null", re.compile("^$"), [""])
_implicit("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_implicit("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789")
_implicit(
    "float",
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+.0123456789",
)
_implicit("merge", "<<", "<")


def parse(text: str, where: str = "line") -> Document:
    """Reads the text of a recipe; faults of the text become problems, never exceptions.

    `where` names the place of every key: "line" counts lines, anything else is used as it stands.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        return Document(problems=(_explain(error),))
    if node is None:
        return Document(problems=("the recipe is empty",))
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        return Document(problems=(f"the recipe must hold `key: value` lines, but it is {kind}",))
    walk = _Walk(where)
    return Document(walk.mapping(node, ()), walk.places, tuple(walk.problems))


def parse_value(text: str) -> Any:
    """The value of one `key=value` of the command line, read as YAML.

    Raises: ValueError with a readable sentence.
    """
    document = parse("value: " + text, where="command line")
    if document.problems:
        raise ValueError("; ".join(document.problems))
    return document.data["value"]


def override(document: Document, settings: Sequence[str], templates: str = "columns") -> Document:
    """The document with `dotted.key=value` settings of the command line laid over it.

    What lies below the key `templates` is text as it stands, so that `columns.text={x}` is a template; in quotes it is YAML.
    """
    data, places, problems = _copy(document.data), dict(document.places), list(document.problems)
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(f"command line: {setting!r} is not of the form key=value (example: layerpeft.r=8)")
            continue
        plain = len(parts) > 1 and parts[0] == templates and not text.lstrip().startswith(('"', "'"))
        try:
            value = text if plain else parse_value(text)
        except ValueError as error:
            reason = str(error).removeprefix("line 1: ").removeprefix("command line: ")
            problems.append(f"command line: {setting!r}: {reason}")
            continue
        problems.extend(_put(data, parts, value, setting))
        stale = [path for path in places if path[: len(parts)] == tuple(parts)]
        for path in stale:
            del places[path]
        places[tuple(parts)] = "command line"
    return Document(data, places, tuple(problems))


def _put(data: dict[str, Any], parts: list[str], value: Any, setting: str) -> list[str]:
    spot: Any = data
    for depth, part in enumerate(parts[:-1]):
        if spot.get(part) is None:
            spot[part] = {}
        if not isinstance(spot[part], dict):
            dotted = ".".join(parts[: depth + 1])
            rest = ".".join(parts[depth + 1 :])
            return [
                f"command line: {setting!r}: {dotted} is {spot[part]!r} in the recipe, which has no part {rest!r};"
                f" give the whole of it, as in {dotted}='{{{rest}: {value}}}'"
            ]
        spot = spot[part]
    spot[parts[-1]] = value
    return []


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def dump(data: dict[str, Any]) -> str:
    """YAML text that `parse` reads back as the same data: keys in their own order, text quoted wherever it looks like a value."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flow(value: Any) -> str:
    """A value on one line, as `key=value` takes it."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


class _Walk:
    """Turns nodes into plain data while noting places and problems."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.places: dict[Path, str] = {}
        self.problems: list[str] = []
        self.open: list[int] = []

    def at(self, node: yaml.Node) -> str:
        return f"line {node.start_mark.line + 1}" if self.where == "line" else self.where

    def value(self, node: Any, path: Path) -> Any:
        """Any node as plain data."""
        if id(node) in self.open:
            self.problems.append(f"{self.at(node)}: an alias (`*name`) that holds itself")
            return None
        self.open.append(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self.scalar(node)
            if node.tag not in (_TAG + "map", _TAG + "seq"):
                return self.strange(node)
            return self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        finally:
            self.open.pop()

    def sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            self.places[(*path, index)] = self.at(child)
            items.append(self.value(child, (*path, index)))
        return items

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        """A mapping, with the places of its keys; a key that stands twice is a problem."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged |= self.merge(value_node, path)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.at(key_node)}: a key must be a single word, not a list or a mapping")
                continue
            key = str(key_node.value)
            if key in own:
                first = self.places[(*path, key)]
                self.problems.append(
                    f"{self.at(key_node)}: {key!r} is written twice (first on {first}); keep one of them"
                )
                continue
            self.places[(*path, key)] = self.at(key_node)
            own[key] = self.value(value_node, (*path, key))
        return merged | own

    def merge(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """What `<<` brings in."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        out: dict[str, Any] = {}
        for part in reversed(parts):
            value = self.value(part, path) if isinstance(part, yaml.MappingNode) else None
            if value is None:
                self.problems.append(f"{self.at(node)}: `<<` takes a mapping (`<<: *name`)")
            else:
                out |= value
        return out

    def scalar(self, node: yaml.Node) -> Any:
        """A scalar as YAML 1.2 reads it."""
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "str":
            return text
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text.replace("_", ""), 0)
            if kind == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower().replace("_", "")))
        except (ValueError, KeyError):
            self.problems.append(f"{self.at(node)}: {text!r} is not a value of the type `!!{kind}`")
            return None
        return self.strange(node)

    def strange(self, node: yaml.Node) -> None:
        self.problems.append(f"{self.at(node)}: the tag {node.tag!r} is not understood; write plain values")


def _explain(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    what = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    if "\\t" in what or (mark is not None and "\t" in _line(mark)):
        return f"{place}a tab where YAML wants spaces (indent with spaces only)"
    if "single document" in str(error) or "another document" in what:
        return f"{place}a second document (`---`); a recipe is one document"
    if "special characters" in what:
        return "the file holds characters that no text file should (is it a YAML file?)"
    if "mapping values are not allowed" in what:
        return f"{place}not readable as YAML: a second `:` in the line, or wrong indentation (put text that holds `: ` in quotes)"
    return f"{place}not readable as YAML: {what}"


def _line(mark: Any) -> str:
    if mark.buffer is None:
        return ""
    start = mark.buffer.rfind("\n", 0, mark.pointer) + 1
    return mark.buffer[start : mark.pointer + 1]
