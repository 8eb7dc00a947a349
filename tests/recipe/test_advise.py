"""`layerpeft advise`: its ranks are those of the criteria, its costs those of the plan, its commands run, and it leaves nothing."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import LayerpeftError
from layerpeft.recipe import advise as advising
from layerpeft.recipe import launching
from layerpeft.recipe.advice_text import told
from layerpeft.recipe.advise import advise
from layerpeft.recipe.comparing.arms import parse_arms
from layerpeft.recipe.comparing.entries import entries_of
from layerpeft.recipe.evidence import Criterion, Evidence, Kept, Tried, evidence
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import prepare
from layerpeft.recipe.yaml import parse
from tests.helpers.short import short_llama

LAYERS = 6
SHORT = (
    f"model_name_or_path={short_llama(LAYERS)}", "max_train_samples=16", "max_eval_samples=4",
    "per_device_train_batch_size=1", "max_length=64", "max_steps=8", 'columns={text: "{answer}"}',
)  # fmt: skip
THREE = "random:3,last,all"
NORM, DEPTH = {"by": "gradient_norm", "statistic": "l1"}, {"by": "depth"}
SPAN, WHOLE = (0.5, 0.25, 0.75), (1.0, 1.0, 1.0)
KNOWN = Evidence(
    (Criterion("norm", NORM, SPAN, SPAN, 2), Criterion("depth", DEPTH, SPAN, SPAN, 2)),
    (Kept("last half", (0.9, 0.8, 1.0), (1.1, 1.0, 1.2), 2), Kept("all", WHOLE, WHOLE, 2)),
    (Tried("LISA", (0.7, 0.6, 0.8), (0.9, 0.85, 0.95), 2),),
    "a test",
)


@pytest.fixture(scope="module", autouse=True)
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advising, "evidence", lambda: KNOWN)
        patch.setattr(advising, "BATCHES", 2)
        yield


def ask(*more: str, name: str = "quickstart"):
    return load_recipe(name, [*SHORT, *more], "score")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Advice on the quickstart; it leaves nothing where it was asked."""
    place = tmp_path_factory.mktemp("advised")
    with contextlib.chdir(place):
        found = advise(ask())
    assert not list(place.iterdir()), "nothing is trained, and nothing is written"
    return found


def test_ranks_costs_and_the_recommendation(found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert found.passes == 2, "one criterion looks at batches, depth at none"
    scored = ["layerpeft.select={by: gradient_norm, statistic: l1, keep: 1, num_batches: 2}"]
    assert main(["score", "quickstart", *SHORT, *scored, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["scores"]["values"]
    order = sorted(range(LAYERS), key=lambda i: -values[i])
    assert {i: ranks[0] for i, ranks in found.ranks.items()} == {i: order.index(i) + 1 for i in range(LAYERS)}
    assert {i: ranks[1] for i, ranks in found.ranks.items()} == {i: LAYERS - i for i in range(LAYERS)}
    mean = {i: sum(ranks) for i, ranks in found.ranks.items()}
    quarter = next(choice for choice in found.choices if "quarter" in choice.rules)
    assert max(mean[i] for i in quarter.layers) <= min(mean[i] for i in set(range(LAYERS)) - set(quarter.layers))
    assert found.recommended == (3, 4, 5), "what the evidence has as the best in equal time"
    assert found.agreed == sum(found.ranks[i][0] <= 3 for i in (3, 4, 5))
    best = next(choice for choice in found.choices if choice.layers == found.recommended)
    planned = forecast("quickstart", [*SHORT, "layerpeft.select=3-5"]).plan
    assert (best.trainable, best.flops, best.peak) == (planned.trainable, planned.flops, planned.peak_bytes)
    assert best.kept_states is None, "8 steps of one row see no row of 16 again"
    assert json.loads(json.dumps(found.to_dict()))["recommended"] == [3, 4, 5]


def test_the_words_say_what_the_numbers_are(found):
    words = told(found)
    assert "80 to 100 % of the gain of all layers after as many steps, and 100 to 120 % in as much time" in words
    assert "LISA 85 to 95 %" in words and "evidence: a test" in words and "not known" in words
    assert "ranks of 6 layers: 1 is the layer to train first, 6 the last one" in words
    head = next(line for line in words.splitlines() if line.strip().startswith("layer "))
    assert head.split("  ") and "rank by norm" in head and "rank by depth" in head


def test_the_printed_commands_run(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    comparing, training = (shlex.split(command)[1:] for command in found.commands)
    assert comparing[0] == "compare" and training[0] == "train"
    assert comparing[-2:] == ["--arms", "random:3,all"], "the last ones are what is recommended"
    assert main(["plan", *comparing[1 : comparing.index("--arms")]]) == 0
    assert main([*training, "max_steps=2", "sample_tokens=0"]) == 0
    kept = json.loads((tmp_path / "outputs" / "quickstart" / "layerpeft.json").read_text())
    assert kept["selection"]["layers"] == [3, 4, 5]


def best(*layers: int) -> advising.Choice:
    return advising.Choice(("half",), layers, 1, 1, None, 1)


@pytest.mark.parametrize(
    ("said", "layers", "among", "select", "arms"),
    [
        ("{layers: 0-4, by: gradient_norm, keep: 2}", (1, 3), range(5), "{layers: '1,3', exclude: '5'}", THREE),
        ("{exclude: first:2, by: gradient_norm, keep: 2}", (2, 4), range(2, 6), "{layers: '2,4', exclude: 'first:2'}", THREE),
        ("{layers: 2-4, exclude: 3, by: snr, keep: 1}", (4,), (2, 4), "{layers: 4, exclude: '0-1,3,5'}", "random:2,all"),
        ("last:2", (1, 2), range(6), "1-2", THREE),
    ],
)  # fmt: skip
def test_arms_of_the_printed_comparison_keep_to_the_candidates(
    said, layers, among, select, arms, tmp_path, monkeypatch
):
    """What the recipe leaves out stays out of every arm; and there are as many draws as there can be."""
    monkeypatch.chdir(tmp_path)
    comparing, training = advising._commands(ask(f"layerpeft.select={said}"), best(*layers), list(among), LAYERS)
    words = shlex.split(comparing)
    assert words[-2:] == ["--arms", arms] and shlex.split(training)[1] == "train"
    recipe = load_recipe("quickstart", words[3:-2], "compare")
    assert parse(f"layerpeft: {{select: {select}}}").data["layerpeft"]["select"] == recipe.select
    setup = prepare(recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(short_llama(LAYERS)))
    found = entries_of(setup, model, parse_arms(arms), {})
    assert found[0].layers == layers and found[-1].layers == tuple(among)
    assert all(set(entry.layers) <= set(among) for entry in found)


def test_what_goes_by_scores_is_left_out_of_the_printed_commands():
    by_score = ask("layerpeft.select={by: gradient_norm, keep: 3}", "layerpeft.layer_lr=by_score")
    for command in advising._commands(by_score, best(3, 4), range(LAYERS), LAYERS):
        words = shlex.split(command)
        settings = [word for word in words[3:] if "=" in word]
        recipe = load_recipe("quickstart", settings, "compare" if words[1] == "compare" else "train")
        assert recipe.config.layer_lr is None and recipe.select == "3-4"
    packed = ask("layerpeft.select=last:2", "layerpeft.quantize_frozen=nf4")
    (command,) = advising._commands(packed, best(*range(LAYERS)), range(LAYERS), LAYERS)
    assert load_recipe("quickstart", shlex.split(command)[3:]).config.quantize_frozen is None
    assert len(advising._commands(ask("eval_dataset=null"), best(3, 4), range(LAYERS), LAYERS)) == 1


def test_several_processes_are_refused_as_compare_refuses_them(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "world_size", lambda: 2)
    said = []
    for command in ("advise", "compare"):
        assert main([command, "quickstart", *SHORT]) == 2
        said.append(capsys.readouterr().err.partition(f"{command} runs in one process")[2].partition(";")[0].strip())
    assert said[0] == said[1] == ", and there are 2: start it without accelerate launch or torchrun"


def test_what_is_kept_counts_where_rows_come_again():
    found = advise(ask("max_steps=-1", "num_train_epochs=4"))
    best = next(choice for choice in found.choices if choice.layers == found.recommended)
    again = forecast("quickstart", [*SHORT, "layerpeft.select=3-5", "max_steps=-1"]).plan.prefix
    assert again is not None and best.kept_states == pytest.approx((again.whole + 3 * again.later) / (4 * again.whole))
    assert found.commands[-1].endswith("layerpeft.prefix_cache=memory")


def test_what_it_refuses():
    for name, more, word in (
        ("quickstart", ["layerpeft.select={by: gradient_norm, keep: 4, unit: target}"], "advice is about whole layers"),
        ("dpo", ["layerpeft.select=last:3"], "its own first step alone"),
        ("quickstart", ["layerpeft.select={layers: 3, by: gradient_norm, keep: 1}"], "no choice to advise on"),
    ):
        with pytest.raises(LayerpeftError, match=word):
            advise(ask(*more, name=name))


def test_layers_that_the_recipe_leaves_out_are_not_recommended(monkeypatch):
    monkeypatch.setattr(advising, "RULES", {name: advising.RULES[name] for name in ("quarter", "last half")})
    found = advise(ask("layerpeft.select={layers: 0-3, by: gradient_norm, keep: 2}"))
    assert set(found.ranks) == set(range(4)) and all(max(c.layers) <= 3 for c in found.choices)
    assert found.recommended == (2, 3) and "exclude: 4-5" in found.commands[0]


def test_a_share_that_holds_no_layer_is_left_out_and_frozen_layers_are_planned_packed_where_some_are_left(monkeypatch):
    monkeypatch.setattr(advising, "RULES", {"time": {"keep": {"time": "10%"}}, "last": {"by": "depth", "keep": "25%"}})
    found = advise(ask("layerpeft.quantize_frozen=nf4"))
    assert [choice.rules for choice in found.choices] == [("all",), ("last",)]
    assert found.recommended == tuple(range(LAYERS)), "of those that are known"
    every, last = found.choices
    assert every.layers == tuple(range(LAYERS)) and last.peak < every.peak
    assert "quantize_frozen=null" in found.commands[-1], "with all of them trained nothing is left to pack"


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
