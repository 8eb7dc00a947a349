"""Regular expressions over names: one that would try too many ways is refused before `re` is given it."""

import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from layerpeft.errors import Problem, SelectionError

STEPS = 20_000  # of a backtracking matcher on one name; `re` itself knows no limit
_parser, _compiler = (importlib.import_module(f"re.{name}") for name in ("_parser", "_compiler"))
# keys of PEFT's configs, and what PEFT puts their patterns into; lists of the first ones are names
_TEXT = ("target_modules", "exclude_modules")
_FORMS = dict.fromkeys(_TEXT, "{}") | {
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


def check_pattern(key: str, pattern: str, names: Iterable[str], form: str = "{}") -> None:
    """`form`: what the pattern is put into before it is matched.

    Raises: SelectionError for text that is no regular expression, or takes more than `STEPS` steps on one of these names.
    """
    try:
        parsed = _parser.parse(form.format(pattern))
        found = None
    except (re.error, OverflowError, RecursionError) as error:
        found = f"{_short(pattern)} is no regular expression: {error}"
    # a few simple repeats take at worst the square of a name's length
    if found is None and (re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{|]", pattern)) > 2):
        slow = next((n for n in dict.fromkeys(re.sub(r"\d+", "0", n) for n in names) if steps(parsed, n) > STEPS), None)
        if slow is not None:
            found = f"the pattern {_short(pattern)} tries more than {STEPS:,} ways to match {slow!r}; write it without repeats "
            found += "inside of repeats, or list names"
    if found:
        raise SelectionError(Problem((key,), found), title=key)


def check_patterns(config: Any, names: Iterable[str]) -> None:
    """All that PEFT would match as regular expressions of a LoRA config. Raises: SelectionError."""
    names = list(names)
    for key, form in _FORMS.items():
        given = getattr(config, key, None)
        for pattern in [given] if isinstance(given, str) else () if key in _TEXT else given or ():
            if isinstance(pattern, str) and pattern != "all-linear":
                check_pattern(key, pattern, names, form)


def steps(parsed: Any, text: str) -> int:
    """How often a backtracking matcher tries something before it has matched all of `text` or knows that it cannot."""
    search = _Search(parsed, text)
    try:
        any(end == len(text) for end in search.walk(parsed.data, 0, 0))
    except (_Enough, RecursionError):
        return STEPS + 1
    return search.taken


class _Enough(Exception):
    """More steps than may be."""


class _Search:
    """One pattern over one text, as `re` goes about it."""

    def __init__(self, parsed: Any, text: str) -> None:
        self.state, self.text, self.taken = parsed.state, text, 0
        self.single: dict[int, Any] = {}

    def walk(self, nodes: Any, index: int, at: int) -> Iterator[int]:
        """Where `nodes` from `index` on may end, in the order of trying."""
        self.spend()
        if index == len(nodes):
            yield at
            return
        for end in self.node(nodes[index], at):
            yield from self.walk(nodes, index + 1, end)

    def node(self, node: Any, at: int) -> Iterator[int]:
        kind, given = str(node[0]), node[1]
        if kind in _REPEATS:
            least, most, body = given
            yield from self.repeat(least, most, body, at, kind == "MIN_REPEAT", 0)
        elif kind == "BRANCH":
            for branch in given[1]:
                yield from self.walk(branch, 0, at)
        elif kind == "SUBPATTERN":
            yield from self.walk(given[-1], 0, at)
        elif kind == "GROUPREF_EXISTS":
            for branch in filter(None, given[1:]):
                yield from self.walk(branch, 0, at)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            start = at if given[0] > 0 else at - given[1].getwidth()[0]
            held = start >= 0 and next(self.walk(given[1], 0, start), None) is not None
            yield from [at] * (held == (kind == "ASSERT"))
        elif kind == "ATOMIC_GROUP":
            yield from list(self.walk(given, 0, at))[:1]
        elif kind in _SINGLE:
            if id(node) not in self.single:
                self.single[id(node)] = _compiler.compile(_parser.SubPattern(self.state, [node]))
            yield from [at + 1] * (self.single[id(node)].match(self.text, at) is not None)
        else:  # places and references: taken to hold, which is at most more to try
            yield at

    def repeat(self, least: int, most: int, body: Any, at: int, lazy: bool, done: int) -> Iterator[int]:
        self.spend()
        if lazy and done >= least:
            yield at
        if done < most:
            for end in self.walk(body, 0, at):
                if end > at or done < least:
                    yield from self.repeat(least, most, body, end, lazy, done + 1)
        if not lazy and done >= least:
            yield at

    def spend(self) -> None:
        self.taken += 1
        if self.taken > STEPS:
            raise _Enough


def _short(pattern: Any) -> str:
    text = repr(pattern)
    return text if len(text) <= 80 else text[:77] + "..."
