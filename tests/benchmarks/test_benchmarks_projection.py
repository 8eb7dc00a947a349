"""The kinds of cases about gradient projection: what they count after folds, what a refresh costs, what is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import case, questions, report, run
from benchmarks.arm import Ready, read_arms
from benchmarks.count import step
from benchmarks.kinds import learning
from benchmarks.model import Batch, Model
from benchmarks.steps import Steps
from layerpeft.errors import ConfigError, Problems
from layerpeft.tuners.galore.projection import projections, state_of

pytest.importorskip("galore_torch")
SMALL = Model(shape="llama-4x64")
ROWS = Batch(2, 16)
PROJECTION = """
title: Projection
about: Two rows.
kind: projection
place: 5
model: {shape: llama-4x64}
batch: {rows: 2, length: 16}
reference: theirs
arms:
  theirs: {arm: galore_torch, rank: 8, update_proj_gap: 3, rest: false}
  ours: {arm: layerpeft_galore, r: 8, update_proj_gap: 3}
"""
REFRESH = """
title: Refreshes
about: Two rows.
kind: refresh
place: 6
model: {shape: llama-4x64}
batch: {rows: 2, length: 16}
rounds: 2
arms:
  theirs: {arm: galore_torch, rank: 8, rest: false}
  ours: {arm: layerpeft_galore, r: 8, stagger: false}
"""
LEARNING = """
title: Learning
about: Two rows.
kind: learning
place: 7
model: {shipped: llama-6m}
batch: {rows: 2, length: 64, text: gsm8k}
lr: 0.03
steps: 4
warm_up: 2
look_every: 3
held_out: 4
seeds: [3, 4]
against: [theirs]
arms:
  ours: {arm: layerpeft_galore, r: 8, update_proj_gap: 2}
  theirs: {arm: galore_torch, rank: 8, update_proj_gap: 2, scale: 0.25, proj_type: right, rest: false}
"""


def measured(folder: Path, text: str) -> dict:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    run.run(case.load(str(path)), folder)
    return json.loads((folder / "mine.json").read_text(encoding="utf-8"))


def wrong(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        case.load(str(path))
    return str(caught.value)


def steps(**options) -> Steps:
    return Steps(read_arms({"layerpeft_galore": options}, Problems("test"))[0], SMALL, ROWS, "plain", 0)


def states(ready: Ready) -> list:
    return [state_of(layer) for _, layer in projections(ready.model.base_model.model, "default")]  # type: ignore[union-attr]


# ---- projection ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return measured(tmp_path_factory.mktemp("projection"), PROJECTION)


def test_state_is_told_by_part_after_folds(found):
    ours, theirs = found["arms"]["ours"]["state"], found["arms"]["theirs"]["state"]
    hidden, inner, rank = 64, 176, 8
    inputs, outputs = 6 * hidden + inner, 4 * hidden + 2 * inner + hidden
    weights = 4 * hidden * hidden + 3 * hidden * inner
    assert ours["trained"] == 4 * 4 * rank * outputs and ours["basis"] == 4 * 4 * rank * inputs
    assert ours["moments"] == 2 * ours["trained"] + 4 * 7 * 4  # and the number of the step of each tensor
    assert ours["originals"] == 4 * 4 * weights
    assert ours["sketching"] > 0 and ours["folds"] > 0
    assert set(theirs) == {"basis", "moments"} and all(theirs.values())


def test_counts_are_those_of_a_period_after_two_folds(found):
    ours, theirs = found["arms"]["ours"], found["arms"]["theirs"]
    assert ours["least_kept_bytes"] <= ours["counts"]["kept_bytes"] <= ours["worst_kept_bytes"]
    assert ours["worst_kept_bytes"] < ours["first_kept_bytes"] and ours["steps_before"] >= 4
    assert theirs["least_kept_bytes"] == theirs["worst_kept_bytes"]
    assert ours["counts"]["trainable"] * 4 == ours["state"]["trained"] == ours["counts"]["gradient_bytes"]
    for row in (ours, theirs):
        counts, state = row["counts"], row["state"]
        assert counts["optimizer_bytes"] == sum(v for k, v in state.items() if k != "folds")
        assert counts["weight_bytes"] == found["arms"]["theirs"]["counts"]["weight_bytes"]
        parts = counts["weight_bytes"] + counts["optimizer_bytes"] + counts["peak_bytes"]
        assert counts["together_bytes"] == parts


def test_the_tables_of_projection_name_every_part(found):
    text = report.section(found, False)
    for words in ("kept, ordinary step", "kept, worst step", "| B |", "originals beside", "folds (host)", "(1.000)"):
        assert words in text
    assert found["arms"]["ours"]["mean_over_usual_step"] > 0 and "with refreshes" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 4 and rows[0].partition("| 1;")[2].strip().endswith("with refreshes |")


def test_folds_count_the_module_that_has_fewest():
    ours = steps(r=8, update_proj_gap=3)
    seen = []
    for _ in range(5):
        ours()
        folds = ours.ready.folds
        assert folds is not None
        assert folds() == min(state.folds.count for state in states(ours.ready))
        seen.append(folds())
    assert seen[0] == 1 and seen[-1] >= 2


def test_an_arm_without_projection_is_refused(tmp_path):
    text = PROJECTION.replace("{arm: galore_torch, rank: 8, update_proj_gap: 3, rest: false}", "{arm: full}")
    assert "arms.theirs: full projects no gradients" in wrong(tmp_path, text)
    assert "Did you mean 'theirs'?" in wrong(tmp_path, PROJECTION.replace("reference: theirs", "reference: their"))


# ---- refreshes -------------------------------------------------------------------------------------------------------


def test_a_refresh_is_a_step_that_renews_everything(tmp_path):
    rows = measured(tmp_path, REFRESH)["arms"]
    assert rows["theirs"]["refresh"]["median"] > 1 and rows["ours"]["refresh"]["min"] > 0
    assert all(row["step_seconds"] > 0 for row in rows.values())
    ours = steps(r=8, update_proj_gap=50, stagger=False)
    for _ in range(3):
        ours()
    assert {state.refreshes for state in states(ours.ready)} == {1}
    assert ours.ready.refresh is not None
    ours.ready.refresh()
    ours()
    assert {state.refreshes for state in states(ours.ready)} == {2}
    assert {state.folds.count for state in states(ours.ready)} == {2}


def test_refreshes_that_are_spread_are_refused(tmp_path):
    assert "arms.ours: its refreshes are spread over steps; write stagger: false" in wrong(
        tmp_path, REFRESH.replace(", stagger: false", "")
    )
    text = REFRESH.replace("{arm: galore_torch, rank: 8, rest: false}", "{arm: lisa}")
    assert "arms.theirs: lisa renews nothing" in wrong(tmp_path, text)


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.pictures
@pytest.mark.usefixtures("shallow")
def test_learning_is_compared_over_seeds(tmp_path):
    found = measured(tmp_path, LEARNING)
    rows = found["arms"]
    for row in rows.values():
        assert [run["seed"] for run in row["runs"]] == [3, 4]
        assert all(run["steps"] == [0, 3, 4] and len(run["losses"]) == 3 for run in row["runs"])
        assert row["mean_decrease"] == pytest.approx(sum(run["decrease"] for run in row["runs"]) / 2, abs=1e-5)
        assert all(run["decrease"] > 0 for run in row["runs"])
    assert len({run["losses"][0] for row in rows.values() for run in row["runs"]}) == 1  # all from the same weights
    assert rows["ours"]["runs"][0]["losses"][-1] != rows["ours"]["runs"][1]["losses"][-1]  # other rows, another basis
    assert rows["theirs"]["over"] == {"theirs": 1.0}
    assert rows["ours"]["over"]["theirs"] == pytest.approx(
        rows["ours"]["mean_decrease"] / rows["theirs"]["mean_decrease"], abs=1e-3
    )
    text = report.section(found, True)
    assert "| arm | seed 3 | seed 4 | mean decrease | over `theirs` |" in text
    picture = learning.draw(found, tmp_path / "learning.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_answers_alone_are_learned():
    train = questions.rows(Model(shipped="llama-6m"), "train", 64)
    assert len(train) == 3000
    for ids, labels in train[:50]:
        assert len(ids) == len(labels) <= 64
        asked = sum(label == -100 for label in labels)
        assert asked > 0 and labels[asked:] == ids[asked:]
    batch = questions.collated([([5, 6, 7], [-100, 6, 7]), ([8], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{shipped: llama-6m}", "{shape: llama-4x64}", "learning needs a model that knows something"),
        ("against: [theirs]", "against: [their]", "Did you mean 'theirs'?"),
        ("steps: 4", "steps: 0", "steps: 0 is not at least 1"),
        ("seeds: [3, 4]", "seeds: []", "seeds: none given"),
    ],
)
def test_what_is_wrong_with_a_case_of_learning_is_said(tmp_path, old, new, says):
    assert says in wrong(tmp_path, LEARNING.replace(old, new))


def test_the_subspace_reaches_the_config():
    for subspace in ("sketch", "svd", "random"):
        ours = steps(r=8, subspace=subspace, seed=7)
        step(ours.ready, ours.batch, 0)
        assert {state.seed for state in states(ours.ready)} == {7}
        assert ours.ready.model.peft_config["default"]._layerpeft.asked.subspace == subspace  # type: ignore[index]
