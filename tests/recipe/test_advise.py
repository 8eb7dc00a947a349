"""`layerpeft advise`: its ranks are those of the criteria, its costs those of the plan, its commands run, and it leaves nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

import pytest

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import LayerpeftError
from layerpeft.recipe import advise as advising
from layerpeft.recipe.advice_text import told
from layerpeft.recipe.advise import advise
from layerpeft.recipe.evidence import Criterion, Evidence, Kept, Tried, evidence
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe

SHORT = ("max_train_samples=64", "max_eval_samples=4", "per_device_train_batch_size=1", "max_length=160", "max_steps=8")
NORM, DEPTH = {"by": "gradient_norm", "statistic": "l1"}, {"by": "depth"}
SPAN, WHOLE = (0.5, 0.25, 0.75), (1.0, 1.0, 1.0)
KNOWN = Evidence(
    (Criterion("norm", NORM, SPAN, SPAN, 2), Criterion("depth", DEPTH, SPAN, SPAN, 2)),
    (Kept("last half", (0.9, 0.8, 1.0), (1.1, 1.0, 1.2), 2), Kept("all", WHOLE, WHOLE, 2)),
    (Tried("LISA", (0.7, 0.6, 0.8), (0.9, 0.85, 0.95), 2),),
    "a test",
)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(advising, "evidence", lambda: KNOWN)
    monkeypatch.setattr(advising, "BATCHES", 2)


def ask(*more: str, name: str = "quickstart"):
    return load_recipe(name, [*SHORT, *more], "score")


def test_ranks_costs_and_the_recommendation(known, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = advise(ask())
    assert not list(tmp_path.iterdir()), "nothing is trained, and nothing is written"
    assert found.passes == 2, "one criterion looks at batches, depth at none"
    capsys.readouterr()
    scored = ["layerpeft.select={by: gradient_norm, statistic: l1, keep: 1, num_batches: 2}"]
    assert main(["score", "quickstart", *SHORT, *scored, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["scores"]["values"]
    order = sorted(range(12), key=lambda i: -values[i])
    assert {i: ranks[0] for i, ranks in found.ranks.items()} == {i: order.index(i) + 1 for i in range(12)}
    assert {i: ranks[1] for i, ranks in found.ranks.items()} == {i: 12 - i for i in range(12)}
    mean = {i: sum(ranks) for i, ranks in found.ranks.items()}
    quarter = next(choice for choice in found.choices if "quarter" in choice.rules)
    assert max(mean[i] for i in quarter.layers) <= min(mean[i] for i in set(range(12)) - set(quarter.layers))
    assert found.recommended == tuple(range(6, 12)), "what the evidence has as the best in equal time"
    assert found.agreed == sum(found.ranks[i][0] <= 6 for i in range(6, 12))
    best = next(choice for choice in found.choices if choice.layers == found.recommended)
    planned = forecast("quickstart", [*SHORT, "layerpeft.select=6-11"]).plan
    assert (best.trainable, best.flops, best.peak) == (planned.trainable, planned.flops, planned.peak_bytes)
    assert best.kept_states is None, "8 steps of one row see no row of 64 again"
    words = told(found)
    assert "80 to 100 % of the gain of all layers after as many steps, and 100 to 120 % in as much time" in words
    assert json.loads(json.dumps(found.to_dict()))["recommended"] == list(range(6, 12))
    assert "LISA 85 to 95 %" in words and "evidence: a test" in words and "not known" in words


def test_the_printed_commands_run(known, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    comparing, training = (shlex.split(command)[1:] for command in advise(ask()).commands)
    assert comparing[0] == "compare" and training[0] == "train"
    assert comparing[-2:] == ["--arms", "random:3,all"], "the last ones are what is recommended"
    assert main(["plan", *comparing[1 : comparing.index("--arms")]]) == 0 and main(training) == 0
    kept = json.loads((tmp_path / "outputs" / "quickstart" / "layerpeft.json").read_text())
    assert kept["selection"]["layers"] == list(range(6, 12))


def test_what_is_kept_counts_where_rows_come_again(known):
    found = advise(ask("max_steps=-1", "num_train_epochs=4"))
    best = next(choice for choice in found.choices if choice.layers == found.recommended)
    again = forecast("quickstart", [*SHORT, "layerpeft.select=6-11", "max_steps=-1"]).plan.prefix
    assert again is not None and best.kept_states == pytest.approx((again.whole + 3 * again.later) / (4 * again.whole))
    assert found.commands[-1].endswith("layerpeft.prefix_cache=memory")


def test_what_it_refuses(known):
    for name, more, word in (
        ("quickstart", ["layerpeft.select={by: gradient_norm, keep: 4, unit: target}"], "advice is about whole layers"),
        ("dpo", ["layerpeft.select=last:3"], "its own first step alone"),
        ("quickstart", ["layerpeft.select={layers: 3, by: gradient_norm, keep: 1}"], "no choice to advise on"),
    ):
        with pytest.raises(LayerpeftError, match=word):
            advise(ask(*more, name=name))


def test_layers_that_the_recipe_leaves_out_are_not_recommended(known):
    found = advise(ask("layerpeft.select={layers: 0-5, by: gradient_norm, keep: 2}"))
    assert set(found.ranks) == set(range(6)) and all(max(c.layers) <= 5 for c in found.choices)
    assert found.recommended == (3, 4, 5)


def test_frozen_layers_in_fewer_bits_are_planned_where_some_are_left(known):
    found = advise(ask("layerpeft.quantize_frozen=nf4"))
    every = next(choice for choice in found.choices if "all" in choice.rules)
    assert every.layers == tuple(range(12)) and min(c.peak for c in found.choices) < every.peak


def test_a_share_that_holds_no_layer_is_left_out(known, monkeypatch, capsys):
    monkeypatch.setattr(advising, "RULES", {"time": {"keep": {"time": "10%"}}, "last": {"by": "depth", "keep": "25%"}})
    found = advise(ask())
    assert [choice.rules for choice in found.choices] == [("all",), ("last",)]
    assert found.recommended == tuple(range(12)), "of those that are known"


def test_the_evidence_that_ships():
    shipped = evidence()
    assert len(shipped.criteria) == 3 and shipped.of("all") is not None
    for criterion in shipped.criteria:
        assert isinstance(criterion.select, Mapping) and layerpeft.LayerLoraConfig(
            select={**criterion.select, "keep": 1}
        )
        assert -1 <= criterion.sets[0] <= 1 and criterion.cells >= 1
    every = shipped.of("all")
    assert every is not None and every.steps == every.time == (1.0, 1.0, 1.0)
    assert {one.rule for one in shipped.kept} <= {*advising.RULES, "all"}
