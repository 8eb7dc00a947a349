"""Recipes that choose below the layer: what is wrong with them, Spectrum, and what `score` and `compare` say."""

from __future__ import annotations

from collections import Counter

import pytest

from layerpeft.errors import RecipeError
from layerpeft.recipe.compare import compare
from layerpeft.recipe.comparing.arms import parse_arms
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.score import score
from tests.helpers.short import LAYERS, short_llama


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ("{unit: head, layers: 0}", "unit: attention heads are chosen with method: head alone"),
        pytest.param(
            "{unit: sublayers, layers: 0}", "unknown unit 'sublayers'. Did you mean 'sublayer'", marks=pytest.mark.slow
        ),
        ("{unit: sublayer, layers: 24}", "layers: .*24 is out of range; sublayers are 0 to 23"),
        pytest.param(
            "{unit: target, by: snr, keep: 85}",
            "keep: 85 targets are asked for, and there are 84 to choose from",
            marks=pytest.mark.slow,
        ),
        ("{unit: target, by: snr, keep: 13, within: kind}", "keep: 13 targets are asked for, and there are 12"),
        ("{unit: expert, layers: 0}", "unit: expert: the model has no experts"),
    ],
)
def test_units_are_judged_before_weights_load(select, words):
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe("quickstart", [f"layerpeft.select={select}", "layerpeft.target_modules=all-linear"], "train")
    assert "command line" in str(caught.value) and "unit: unit" not in str(caught.value)


def test_spectrum_ships_and_score_prints_units(place):
    said: list[str] = []
    recipe = load_recipe("spectrum", [f"model_name_or_path={short_llama(3)}"], "score")
    found = score(recipe, said.append)
    kinds = Counter(name.split(".", 3)[3] for name in found.targets)
    assert len(kinds) == 7 and set(kinds.values()) == {1}  # a quarter of three, half up
    table = (place / "outputs/spectrum/scores.csv").read_text().splitlines()
    assert table[0].startswith("target,name,score") and len(table) == 1 + 7 * 3
    assert said[0].split()[:2] == ["target", "name"]
    command = next(line for line in said if "scores.json" in line and "unit" in line)
    assert "within" in command


@pytest.mark.slow
def test_compare_draws_as_many_of_each_kind():
    settings = [f"model_name_or_path={short_llama()}", "max_steps=1", "max_eval_samples=2", "warmup_steps=0"]
    settings += ["layerpeft={select: {by: snr, unit: target, within: kind, keep: 1}, r: 2, target_modules: all-linear}"]
    found = compare(load_recipe("quickstart", settings, "compare"), parse_arms("random:2,last,all"), lambda _: None)
    assert [len(run.layers) for run in found.runs] == [7, 7, 7, 7, 7 * LAYERS]
    assert len({run.trainable for run in found.runs[:4]}) == 1 and found.unit == "target"
