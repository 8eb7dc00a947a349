"""Advice and the runs that followed it: gains beside those of all layers, by seed."""

from __future__ import annotations

import pytest

from benchmarks.kinds import advice
from layerpeft.errors import ConfigError, Problems


def compared(measure, before, *runs):
    keys = ("arm", "seed", "value", "seconds", "steps")
    return {"measure": measure, "before": before, "runs": [dict(zip(keys, run, strict=True)) for run in runs]}


def test_gains_are_told_beside_those_of_all_layers():
    found = compared(
        "eval_loss", 4.0,
        ("6-11", 0, 2.0, 3, 20), ("all", 0, 2.5, 4, 10), ("random:0", 0, 3.0, 3, 10), ("random:1", 0, 2.0, 3, 10),
        ("6-11", 1, 3.0, 3, 20), ("all", 1, 1.5, 4, 10), ("random:0", 1, 3.0, 3, 10), ("random:1", 1, 3.0, 3, 10),
    )  # fmt: skip
    assert advice._came(found) == {"recommended": [1.0, 0.5], "all": [0.75, 1.25], "random": [0.75, 0.5]}
    better = compared("eval_macro_f1", 0.1, ("last", 0, 0.5, 1, 1), ("all", 0, 0.3, 1, 1))
    assert advice._came(better) == {"recommended": [2.0], "all": [1.0]}


def test_a_line_says_what_was_foretold_and_what_came():
    choices = [{"layers": (0, 1), "flops": 8}, {"layers": (1,), "flops": 6}]
    one = {
        "recipe": "quickstart", "foretold": [1.1, 1.0, 1.2], "steps": 12.4, "came": {"recommended": [1.0, 0.5], "random": [0.25]},
        "advice": {"recommended": (1,), "choices": choices, "passes": 8},
    }  # fmt: skip
    assert advice.tables({"recipes": [one]}).splitlines()[-1] == (
        "| `quickstart` | 1 | 8 | 12 steps | 0.75 | 1.10 (1.00 to 1.20) | 0.75 (0.50 to 1.00) | 0.25 (0.25 to 0.25) |  |"
    )


def test_a_recipe_that_does_not_ship_is_named():
    problems = Problems("case advice")
    advice.check(advice.Options({"quickstrat": []}), problems)
    with pytest.raises(ConfigError, match="quickstart"):
        problems.raise_if_any(ConfigError)
