"""Templates are said in the names of the rows, as each door takes them."""

import shlex
import subprocess

import pytest

from layerpeft.recipe.templates import EXAMPLE, as_flags, as_setting, in_recipe, suited
from layerpeft.recipe.yaml import dump, flow, override, parse
from layerpeft.using.incoming import templates

TRICKY = {"prompt": "It's \\n: {a b}\nso", "completion": '"{c}"'}


@pytest.mark.parametrize(
    ("have", "found"),
    [
        (["q", "a"], {"prompt": "{q}\n", "completion": "{a}"}),
        (["id", "q", "a"], {"prompt": "{id}\n", "completion": "{a}"}),
        (["q"], EXAMPLE), ([], EXAMPLE), (["q:1", "a"], EXAMPLE), (["q" * 50, "a"], EXAMPLE),
    ],
)  # fmt: skip
def test_an_example_has_the_names_of_the_rows_where_they_can_be_had(have: list[str], found: dict[str, str]) -> None:
    assert suited(EXAMPLE, have) == found


def test_what_is_asked_comes_first_whatever_stands_first() -> None:
    told = suited(dict(reversed(EXAMPLE.items())), ["q", "a"])
    assert told == {"completion": "{a}", "prompt": "{q}\n"}


def test_a_recipe_has_them_in_order_and_each_on_its_line() -> None:
    told = {"prompt": "It is {q}\nso:", "completion": " {a}"}
    assert list(told) == list(parse(flow(told)).data)
    assert dump({"columns": told}) == "columns:\n  prompt: \"It is {q}\\nso:\"\n  completion: ' {a}'\n"
    assert parse(dump(told)).data == parse(flow(told)).data == told


def test_a_name_that_stands_twice_is_one_and_braces_stay() -> None:
    assert suited({"a": "{x} {{y}} {x}", "b": "{z}"}, ["1", "2"]) == {"a": "{1} {{y}} {1}", "b": "{2}"}


@pytest.mark.parametrize("given", [EXAMPLE, TRICKY])
def test_each_door_reads_what_is_said_to_it(given: dict[str, str]) -> None:
    assert parse(in_recipe(given)).data == {"columns": given}
    assert override(parse("{}"), shlex.split(as_setting(given))).data == {"columns": given}
    told = subprocess.run(["bash", "-c", f"printf '%s\\0' {as_flags(given)}"], capture_output=True, check=True).stdout
    words = told.decode().rstrip("\0").split("\0")
    assert words[::2] == ["--column"] * 2 and templates(words[1::2]) == given
