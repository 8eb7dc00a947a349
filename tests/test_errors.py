"""Problems are data: keys and a sentence each. A message is made of them, and nobody reads it back."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, LayerQuantConfig
from layerpeft.errors import ConfigError, LayerpeftError, Problem, Problems, SelectionError, unknown
from layerpeft.selection.grammar import how_many
from layerpeft.selection.select import Select


def raised(problems: Problems, kind: type[LayerpeftError] = ConfigError) -> LayerpeftError:
    with pytest.raises(kind) as caught:
        problems.raise_if_any(kind)
    return caught.value


def test_a_sentence_is_a_problem_without_keys() -> None:
    error = ConfigError("that is wrong")
    assert str(error) == "that is wrong" and error.args == ("that is wrong",)
    assert error.problems == error.listed() == (Problem((), "that is wrong"),)


def test_a_lone_problem_stands_behind_the_title_and_several_below_it() -> None:
    problems = Problems("config")
    problems.raise_if_any(ConfigError)
    problems.add("r=0 is too small", "r")
    one = raised(problems)
    assert str(one) == "config: r=0 is too small"
    assert one.problems == (Problem(("r",), "r=0 is too small"),)
    assert one.listed() == (Problem(("r",), "config: r=0 is too small"),)
    problems.add("a line\n  - that looks like two")
    two = raised(problems)
    assert str(two) == "config: 2 problems\n  - r=0 is too small\n  - a line\n  - that looks like two"
    assert two.problems == two.listed() == (one.problems[0], Problem((), "a line\n  - that looks like two"))


def test_errors_from_deeper_down_bring_their_problems_with_their_keys() -> None:
    inner, middle, outer = Problems("select"), Problems("quant"), Problems("config")
    inner.add("keep: missing", "keep")
    inner.add("all is lost")
    middle.absorb(raised(inner), "select")
    outer.add("r=0 is too small", "r")
    outer.absorb(raised(middle), "quant")
    error = raised(outer)
    assert [problem.path for problem in error.problems] == [("r",), ("quant", "select", "keep"), ("quant", "select")]
    assert [problem.text for problem in error.problems] == ["r=0 is too small", "keep: missing", "all is lost"]
    assert str(error) == (
        "config: 2 problems\n  - r=0 is too small\n  - quant: select: 2 problems\n  - keep: missing\n  - all is lost"
    )


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_copies_and_pickles_keep_the_problems(again) -> None:
    problems = Problems("config")
    problems.add("r=0 is too small", "r")
    problems.absorb(SelectionError(Problem(("keep",), "keep: missing")), "select")
    error = raised(problems)
    twin = again(error)
    assert type(twin) is ConfigError and str(twin) == str(error) and twin.problems == error.problems
    assert twin.title == "config" and len(twin.problems) == 2


CASES = [
    (lambda: how_many(5, 4), ["keep"]),
    (lambda: Select.parse({"by": "nope", "keep": 0, "seed": "x", "layers": "lst:2"}), ["keep", "by", "seed", "layers"]),
    (lambda: Select.parse({"by": "gradient_norm", "keep": 2, "exakt": True}), ["exakt"]),
    (lambda: LayerLoraConfig(select={"by": "random", "keep": 0}, train_new=cast(Any, 3)), ["select.keep", "train_new"]),
    (lambda: LayerLoraConfig(quant={"bits": 77, "group_size": 1}), ["quant.bits", "quant.group_size"]),
    (lambda: LayerLoraConfig(quant={"bitz": 4}), ["quant.bitz"]),
    (lambda: LayerLoraConfig(quant={"select": {"by": "random", "keep": 0}}), ["quant.select.keep"]),
    (lambda: LayerQuantConfig(bits={"first:2": 77}), ["bits"]),
    (lambda: LayerGaloreConfig(select="last:2", use_dora=True, scale=0), ["scale", "use_dora"]),
    (lambda: LayerFullConfig(select="last:2", r=4, biases=cast(Any, 3)), ["biases", "r"]),
]


@pytest.mark.parametrize("make, paths", CASES)
def test_what_is_wrong_with_a_setting_is_found_at_its_keys(make, paths: list[str]) -> None:
    with pytest.raises(LayerpeftError) as caught:
        make()
    assert [".".join(problem.path) for problem in caught.value.problems] == paths
    assert all(problem.text in str(caught.value) for problem in caught.value.problems)


# ---- the package ----------------------------------------------------------------------------------------------------

PACKAGE = Path(layerpeft.__file__).parent
SENTENCES = ("why", "text", "sentence", "message", "problems")  # attributes that hold words for people
READING = (
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "split",
    "splitlines",
    "partition",
    "rpartition",
    "find",
)


def is_sentence(node: ast.AST, caught: set[str]) -> bool:
    """`str(error)` of a caught exception, an f-string that holds one, or an attribute that is a sentence."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("str", "repr"):
        return any(isinstance(a, ast.Name) and a.id in caught for a in node.args)
    if isinstance(node, ast.JoinedStr):
        parts = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        return any(isinstance(part, ast.Name) and part.id in caught for part in parts)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in caught:
        return node.attr == "args"
    return isinstance(node, ast.Attribute) and node.attr in SENTENCES


def readings(tree: ast.Module) -> Iterator[ast.AST]:
    """Places that cut, search or match a sentence, or keep that of a caught exception under another name."""
    caught = {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            parts = list(node.comparators)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asked = node.func
            parts = [asked.value] if asked.attr in READING else []
            parts += node.args if isinstance(asked.value, ast.Name) and asked.value.id == "re" else []
        elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            parts = [node.value]
        if any(is_sentence(part, caught) for part in parts):
            yield node


BAD = [
    "try: f()\nexcept E as error: items = str(error)",
    "try: f()\nexcept E as error: items = str(error).split()",
    "try: f()\nexcept E as error: return 'budget' in str(error)",
    "try: f()\nexcept E as why: return f'{why}'.startswith('keep')",
    "try: f()\nexcept E as error: return re.search('key', str(error))",
    "try: f()\nexcept E as error: return error.args[0]",
    "'below' in stop.why",
    "found.verdict.sentence.partition(':')",
]


@pytest.mark.parametrize("source", BAD)
def test_the_test_sees_what_reads_a_sentence(source: str) -> None:
    assert list(readings(ast.parse(source.replace("return ", ""))))


def test_no_sentence_is_read_back() -> None:
    """But for the words of other libraries, in the last lines of errors.py."""
    found = [
        f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "errors.py"
        for node in readings(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


def test_a_list_of_what_is_allowed_names_nothing_twice() -> None:
    """As `outliers`, which is a criterion and a recipe."""
    assert unknown("arm", "outlier", ("random", "outliers", "outliers")).endswith(" Allowed: outliers, random.")
