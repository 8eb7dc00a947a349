"""Options that are right each by itself: what they mean beside each other, for how many batches, and while layers change."""

from __future__ import annotations

import re

import pytest

from layerpeft import LayerLoraConfig, Select, get_peft_model, score_layers
from layerpeft.errors import ConfigError, LayerpeftError, RecipeError, ScoreError, SelectionError
from layerpeft.recipe.read import load_recipe
from tests.helpers.loops import adamw, chosen, llama, make_batches, record, step, wrap

CREDIT = {"by": "gradient_norm", "statistic": "credit", "steps": 4, "k": 2, "num_batches": 2, "keep": 1}


@pytest.mark.parametrize(
    ("select", "sentence"),
    [
        ({"by": "gradient_norm", "statistic": "l1", "k": 8}, "k: is of statistic: frobenius or nuclear"),
        ({"by": "gradient_norm", "exact": True, "k": 3}, "k: is of exact: false, not of exact: true"),
        ({"by": "gradient_norm", "statistic": "l1", "exact": True}, "statistic: l1 is exact as it is"),
        ({"by": "gradient_norm", "lr": 1e-3}, "lr: is of statistic: credit, not of statistic: frobenius"),
        ({"by": "fisher", "exact": True, "k": 3}, "k: is of exact: false"),
        ({"by": "heavy_tail", "places": 3}, "places: is of form: averaged, not of form: published"),
        ({"by": "representation", "measure": "curvature", "noise": 0.2}, "noise: is of measure: invariance"),
        (
            {"by": "quantization_error", "group_size": 32},
            "group_size: is of precision: hqq1 or .*, not of precision: nf4",
        ),
        ({"by": "output_kl", "precision": 8, "double_quant": True}, "double_quant: is of precision: fp4 or nf4 or 4"),
        ({"by": "snr", "keep": "auto", "share": 0.3}, "share: is of split: cumulative, not of split: otsu"),
        ({"by": "snr", "pick": "split", "window": [0.3, 0.7], "keep": "auto"}, "window: is of split: ir_tuning"),
    ],
)
def test_an_option_that_means_nothing_beside_another_is_refused_and_taking_it_out_is_the_cure(select, sentence):
    given = {"keep": 1} | select
    with pytest.raises(LayerpeftError, match=f"{sentence}.*take it out") as caught:
        Select.parse(given)
    (problem,) = caught.value.problems
    Select.parse({k: v for k, v in given.items() if k != problem.path[-1]})
    with pytest.raises(ConfigError, match=sentence) as caught:  # every other fault is told with it
        LayerLoraConfig(select={**given, "seed": "x"}, train_new=5)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 3


def test_what_is_used_or_asks_for_nothing_is_taken():
    for select in (
        {"by": "gradient_norm", "statistic": "nuclear", "exact": False, "signal": False, "k": 4},
        {"by": "gradient_norm", "statistic": "credit", "k": 2, "steps": 3},
        {"by": "heavy_tail", "form": "averaged", "window": 8, "places": 2},
        {"by": "quantization_error", "precision": 2, "group_size": 32},
        {"by": "output_kl", "precision": 4, "double_quant": True},
    ):
        Select.parse({**select, "keep": 1})


def test_a_typo_is_one_fault():
    for select, name in (({"by": "snr", "keep": 1, "within": "kond"}, "within"), ({"per": "csot"}, "per")):
        with pytest.raises(SelectionError) as caught:
            Select.parse(select)
        assert [p.path for p in caught.value.problems] == [(name,)]


def test_agreement_takes_two_batches_wherever_they_come_from():
    agreement = {"by": "gradient_norm", "statistic": "agreement", "keep": 1}
    with pytest.raises(SelectionError, match="num_batches: 1 is too few .*write num_batches: 2"):
        Select.parse({**agreement, "num_batches": 1})
    model, batches = wrap(agreement), make_batches()
    optimizer = adamw(model)
    step(model, optimizer, batches[0])
    assert chosen(model) is None
    step(model, optimizer, batches[1])
    want = score_layers(llama(), batches=batches[:2], num_batches=2, statistic="agreement", progress=False)
    assert record(model).selection.scores.values == pytest.approx(want.values, rel=1e-4)


@pytest.mark.parametrize("select", [CREDIT, {"by": "language", "keep": 1}], ids=["credit", "language"])
def test_what_is_measured_before_training_is_not_measured_again(select):
    again = {**select, "reselect_steps": 2}
    with pytest.raises(SelectionError, match="rescore_steps: .*write rescore_steps: never") as caught:
        Select.parse(again)
    cure = re.search(r"write (\w+): (\w+)", str(caught.value))
    assert cure is not None
    with pytest.raises(SelectionError, match="warmup_steps: .*leave warmup_steps out"):
        Select.parse({**again, cure[1]: cure[2], "warmup_steps": 3})
    with pytest.raises(ScoreError, match="pass .*batches=…"):
        wrap({**again, cure[1]: cure[2]})
    batches = make_batches()
    model = get_peft_model(
        llama(), LayerLoraConfig(select={**again, cure[1]: cure[2], "pick": "sigmoid"}, r=2, batches=batches)
    )
    optimizer = adamw(model)
    for batch in batches[:5]:
        step(model, optimizer, batch)
    windows = record(model).schedule.standing
    want = score_layers(llama(), batches=batches, progress=False, **{k: v for k, v in select.items() if k != "keep"})
    assert windows.known == pytest.approx(want.values, rel=1e-5) and len(windows.history) == 3


def test_the_command_line_takes_keys_of_a_recipe_out():
    for method, keys in (("full", ["r", "lora_alpha"]), ("galore", ["lora_alpha"])):
        settings = [f"layerpeft.method={method}"]
        with pytest.raises(RecipeError) as caught:
            load_recipe("quickstart", settings)
        cures = re.findall(r"\((\S+=null) takes it out\)", str(caught.value))
        assert cures == [f"layerpeft.{key}=null" for key in keys]
        recipe = load_recipe("quickstart", settings + cures)
        assert recipe.method == method and not {*keys} & {*recipe.block} and recipe.select["keep"]["time"] == "75%"
    with pytest.raises(RecipeError, match="command line: method: write `layerpeft.method=full`$"):
        load_recipe("quickstart", ["method=full"])
    told = ["max_length=null", "columns.prompt=null", "columns.completion=null", "columns.text={question}"]
    recipe = load_recipe("quickstart", told)  # of max_length null is a value
    assert recipe.values["columns"] == {"text": "{question}"} and recipe.values["max_length"] is None
