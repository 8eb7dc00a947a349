"""YAML as recipes use it: YAML 1.2 scalars, a line number for every key, every fault of the text as a readable sentence."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
COMMAND = 0  # stands for the command line where a line of the file would stand
DEPTH, PLACES, KEYS = (
    40,
    20_000,
    2_000,
)  # of lists and mappings in each other; keys and values in all; keys of a mapping
NO_TEXT = "the file holds characters that no text file should (is it a YAML file?)"
TOO_DEEP = f"lists and mappings lie more than {DEPTH} deep in each other, which no recipe needs"
TOO_MANY = f"more than {PLACES:,} keys and values (aliases count with all they stand for), which no recipe needs"
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a recipe: the line (`COMMAND`, or None where it has no place), a sentence, and the keys down to it."""

    line: int | None
    text: str
    path: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return self.text if self.line is None else f"{spelled(self.line)}: {self.text}"


def spelled(line: int | None) -> str:
    """A place as a person reads it: "line 7", "command line", or nothing."""
    return "" if line is None else f"line {line}" if line != COMMAND else "command line"


@dataclass(frozen=True)
class Document:
    """A parsed recipe: plain data, the line of each key (or `COMMAND`), and what is wrong with the text. `nulled`: keys that the
    command line has set to null, and that the recipe has."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    nulled: frozenset[Path] = frozenset()

    def line(self, *path: str | int) -> int | None:
        """Where a key was written: its own line, else that of the nearest key around it, else None."""
        return next((self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), None)


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, where PyYAML was built with it


class _Loader(_Base):
    """SafeLoader with YAML 1.2's scalars: `no`, `off` and `010` stay text, `1e-5` is a number, dates stay text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either YAML version would read as something else, and never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Text with line ends stays on one line, as people write templates."""
    return dumper.represent_scalar(_TAG + "str", value, style='"' if "\n" in value else None)


_Dumper.add_representer(str, _text)


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


def parse(text: str, line: int | None = None) -> Document:
    """Reads the text of a recipe; faults of the text become problems, never exceptions. `line`: of all of it, as `COMMAND`."""
    try:
        node = None if (endless := _endless(text)) else _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        return Document(faults=(_explain(error, text),))
    except UnicodeEncodeError:  # half a character, as a command line can hold
        return Document(faults=(Fault(None, NO_TEXT),))
    if endless:
        return Document(faults=(endless,))
    if node is None:
        return Document(faults=(Fault(None, "the recipe is empty"),))
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        return Document(faults=(Fault(None, f"the recipe must hold `key: value` lines, but it is {kind}"),))
    walk = _Walk(line)
    try:
        return Document(walk.mapping(node, ()), walk.lines, tuple(walk.faults))
    except _TooMuch as error:
        return Document(faults=(Fault(error.line, error.text),))


def _endless(text: str) -> Fault | None:
    """What in a text is more than a recipe can mean, or stands for nothing, found before anything is built of it."""
    depth, places, anchors = 0, 0, set()
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) and event.anchor not in anchors:
            return Fault(event.start_mark.line + 1, f"not readable as YAML: undefined alias {event.anchor!r}")
        anchors.add(getattr(event, "anchor", None))
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        places += isinstance(event, yaml.NodeEvent)
        if depth > DEPTH or places > PLACES:
            return Fault(event.start_mark.line + 1, TOO_DEEP if depth > DEPTH else TOO_MANY)
    return None


class _TooMuch(Exception):
    def __init__(self, line: int, text: str) -> None:
        self.line, self.text = line, text


def override(document: Document, settings: Sequence[str]) -> Document:
    """The document with `dotted.key=value` settings of the command line laid over it.

    What lies below the key `columns` is text as it stands, so that `columns.text={x}` is a template; in quotes it is YAML. With
    null a key of the recipe goes, where null is no value of its own.
    """
    data, lines, faults = copy.deepcopy(document.data), dict(document.lines), list(document.faults)
    nulled: set[Path] = set()
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            faults.append(Fault(COMMAND, f"{setting!r} is not of the form key=value (example: layerpeft.r=8)"))
            continue
        plain = len(parts) > 1 and parts[0] == "columns" and not text.lstrip().startswith(('"', "'")) and text != "null"
        read = Document({"value": text}) if plain else parse("value: " + text, COMMAND)
        if read.faults:
            reasons = "; ".join(fault.text for fault in read.faults)
            faults.append(Fault(COMMAND, f"{setting!r}: {reasons}"))
            continue
        faults.extend(_put(data, parts, read.data["value"], setting))
        nulled.discard(tuple(parts))
        if read.data["value"] is None and tuple(parts) in document.lines:
            nulled.add(tuple(parts))
        lines = {path: line for path, line in lines.items() if path[: len(parts)] != tuple(parts)}
        lines[tuple(parts)] = COMMAND
    return Document(data, lines, tuple(faults), frozenset(nulled))


def _put(data: dict[str, Any], parts: list[str], value: Any, setting: str) -> list[Fault]:
    spot: Any = data
    for depth, part in enumerate(parts[:-1]):
        if spot.get(part) is None:
            spot[part] = {}
        if not isinstance(spot[part], dict):
            dotted = ".".join(parts[: depth + 1])
            rest = ".".join(parts[depth + 1 :])
            sentence = (
                f"{setting!r}: {dotted} is {spot[part]!r} in the recipe, which has no part {rest!r};"
                f" give the whole of it, as in {dotted}='{{{rest}: {value}}}'"
            )
            return [Fault(COMMAND, sentence)]
        spot = spot[part]
    spot[parts[-1]] = value
    return []


def dump(data: dict[str, Any]) -> str:
    """YAML text that `parse` reads back as the same data: keys in their own order, text quoted wherever it looks like a value."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flow(value: Any) -> str:
    """A value on one line, as `key=value` takes it; keys in their own order."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("...\n").strip()


class _Walk:
    """Turns nodes into plain data while noting lines and faults. `line`: of every node, where they do not count."""

    def __init__(self, line: int | None) -> None:
        self.given = line
        self.lines: dict[Path, int] = {}
        self.faults: list[Fault] = []
        self.open: list[int] = []
        self.walked = 0

    def at(self, node: yaml.Node) -> int:
        return node.start_mark.line + 1 if self.given is None else self.given

    def wrong(self, node: yaml.Node, sentence: str) -> None:
        self.faults.append(Fault(self.at(node), sentence))

    def value(self, node: Any, path: Path) -> Any:
        """Any node as plain data."""
        if id(node) in self.open:
            self.wrong(node, "an alias (`*name`) that holds itself")
            return None
        self.walked += 1
        if self.walked > PLACES or len(self.open) > DEPTH:
            raise _TooMuch(self.at(node), TOO_MANY if self.walked > PLACES else TOO_DEEP)
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
            self.lines[(*path, index)] = self.at(child)
            items.append(self.value(child, (*path, index)))
        return items

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        """A mapping, with the places of its keys; a key that stands twice is a problem."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        if len(node.value) > KEYS:
            raise _TooMuch(self.at(node), f"a mapping of more than {KEYS:,} keys, which no recipe needs")
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged |= self.merge(value_node, path)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.wrong(key_node, "a key must be a single word, not a list or a mapping")
                continue
            key = str(key_node.value)
            if key in own:
                first = spelled(self.lines[(*path, key)])
                self.wrong(key_node, f"{key!r} is written twice (first on {first}); keep one of them")
                continue
            self.lines[(*path, key)] = self.at(key_node)
            own[key] = self.value(value_node, (*path, key))
        return merged | own

    def merge(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """What `<<` brings in."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        out: dict[str, Any] = {}
        for part in reversed(parts):
            value = self.value(part, path) if isinstance(part, yaml.MappingNode) else None
            if value is None:
                self.wrong(node, "`<<` takes a mapping (`<<: *name`)")
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
            self.wrong(node, f"{text[:40]!r} is not a value of the type `!!{kind}`")
            return None
        return self.strange(node)

    def strange(self, node: yaml.Node) -> None:
        self.wrong(node, f"the tag {node.tag!r} is not understood; write plain values")


def _explain(error: yaml.YAMLError, source: str) -> Fault:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)  # YAML's own words
    text = f"not readable as YAML: {what}"
    lines = source.splitlines()
    if mark is not None and mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]:
        text = "a tab where YAML wants spaces (indent with spaces only)"
    elif "another document" in what:
        text = "a second document (`---`); a recipe is one document"
    elif "characters are not allowed" in what:
        return Fault(None, NO_TEXT)
    elif "mapping values are not allowed" in what:
        text = (
            "not readable as YAML: a second `:` in the line, or wrong indentation (put text that holds `: ` in quotes)"
        )
    return Fault(None if mark is None else mark.line + 1, text)
