"""Machine-independent counts may not grow: every arm of the case `guard` is counted anew and held against the result checked in."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from benchmarks.arm import Arm, read_arms
from benchmarks.case import RESULTS, load
from benchmarks.kinds import projection, wrapping
from benchmarks.kinds.scan import REFERENCE, counts
from benchmarks.kinds.training import Options
from benchmarks.setting import prepare
from benchmarks.steps import Steps
from benchmarks.trace import traced
from layerpeft.errors import Problems
from tests.helpers.repeating import some

GUARD, FOLDED = load("guard"), load("guard_projection")
STORED = json.loads((RESULTS / "guard.json").read_text(encoding="utf-8"))
SAME = all(
    version(p) == v for p, v in STORED["provenance"]["versions"].items() if p in ("torch", "transformers", "peft")
)
ROOM = 1.001 if SAME else 1.03  # other versions may differ a little by themselves


def counted(options: Options, label: str) -> dict[str, int]:
    arms: dict[str, Arm] = {arm.label: arm for arm in read_arms(options.arms, Problems("test"))}
    steps = Steps(arms[label], options.model, options.batch, options.setting, options.seed)
    for _ in range(options.warm_up):
        steps()
    return steps.counts()


def after_folds(options: projection.Options, label: str) -> dict[str, int]:
    """Every count of an arm of projection: of an ordinary step, of the worst ones, and of its state by part."""
    arm = next(arm for arm in read_arms(options.arms, Problems("test")) if arm.label == label)
    steps = Steps(arm, options.model, options.batch, options.setting, options.seed)
    return flat(projection.counted(steps, arm, options))


def flat(row: dict) -> dict[str, int]:
    return row["counts"] | row["state"] | {k: v for k, v in row.items() if k.endswith("_bytes")}


# what others train costs what their packages make of it
OURS = ["lisa", "layerpeft", "layerpeft_galore"]


@pytest.mark.parametrize("label", some(GUARD.options.arms, OURS))
def test_no_count_has_grown(label):
    if label in ("galore_torch", "owlore"):
        pytest.importorskip("galore_torch")
    stored = STORED["arms"][label]["counts"]
    found = counted(GUARD.options, label)
    assert set(found) == set(stored)
    grown = {key: (found[key], bar) for key, bar in stored.items() if found[key] > bar * ROOM}
    assert not grown, "python -m benchmarks.run guard writes new numbers, where they are meant to grow"


@pytest.mark.parametrize("label", some(FOLDED.options.arms, ["layerpeft_galore_3"]))
def test_no_count_of_projection_has_grown_after_two_folds(label):
    pytest.importorskip("galore_torch")
    stored = flat(result("guard_projection")["arms"][label])
    found = after_folds(FOLDED.options, label)
    assert set(found) == set(stored) and found["worst_kept_bytes"] >= found["kept_bytes"] > 0
    grown = {key: (found[key], bar) for key, bar in stored.items() if found[key] > bar * ROOM}
    assert not grown, "python -m benchmarks.run guard_projection writes new numbers, where they are meant to grow"


@pytest.mark.slow  # tests/training/test_counts.py holds the same at a small shape
@pytest.mark.parametrize("name", ["overhead_cut", "overhead_all"])
def test_no_count_without_checkpointing_has_grown(name):
    """At the size of the results, since the guard is checkpointed."""
    stored = result(name)["arms"]["layerpeft"]["counts"]
    found = counted(load(name).options, "layerpeft")
    grown = {key: (found[key], bar) for key, bar in stored.items() if found[key] > bar * ROOM}
    assert set(found) == set(stored) and not grown


@pytest.mark.slow  # the guard holds the same counts at a small shape
def test_no_count_of_the_large_shape_has_grown():
    options = load("llama2_7b_traced").options
    arm = next(arm for arm in read_arms(options.arms, Problems("test")) if arm.label == "layerpeft")
    stored = result("llama2_7b_traced")["arms"]["layerpeft"]["counts"]
    found = traced(arm, options.model, options.batch, lambda ready: prepare(ready, options.setting))
    grown = {key: (found[key], bar) for key, bar in stored.items() if found[key] > bar * ROOM}
    assert set(found) == set(stored) and not grown


@pytest.mark.slow  # tests/selection/test_scorers_cost.py counts the passes of every scorer
def test_no_count_of_a_scan_has_grown():
    options = load("scan").options
    stored, found = result("scan")["scan"], counts(replace(options, count=1))
    for name in ("probe", "exact"):
        assert found[name]["flops"] <= stored[name]["flops"] / options.count * ROOM, name
        for key in ("peak_bytes", "weight_bytes", "gradient_share"):
            assert found[name][key] <= stored[name][key] * ROOM, (name, key)
    assert found["probe"]["flops"] <= 1.3 * found[REFERENCE]["flops"]
    assert found["probe"]["gradient_share"] <= 0.03


@pytest.mark.slow  # tests/training/test_backward_untouched.py counts the calls of a small model
@pytest.mark.skipif(not SAME, reason="calls are those of the versions that the result was taken with")
def test_wrapping_makes_no_more_calls_than_it_did():
    found = wrapping.calls(load("wrapping").options)
    for name, row in result("wrapping")["wrapping"].items():
        assert found[name] <= 1.01 * row["calls"], name
    assert found["all layers"] <= 1.05


@pytest.mark.slow  # as of the guard below
def test_a_grown_count_of_projection_would_be_seen():
    """The bar lies close: a rank more is above it."""
    stored = flat(result("guard_projection")["arms"]["layerpeft_galore_3"])
    more = replace(FOLDED.options, arms={"more": {**FOLDED.options.arms["layerpeft_galore_3"], "r": 17}})
    found = after_folds(more, "more")
    for key in ("trainable", "gradient_bytes", "optimizer_bytes", "trained", "basis", "moments"):
        assert found[key] > stored[key] * ROOM, key
    assert found["originals"] == stored["originals"]


def test_projection_is_smaller_than_the_reference_s():
    """At the size of the guard already; the claims at their own size are held below."""
    rows = result("guard_projection")["arms"]
    ours, theirs = rows["layerpeft_galore"]["counts"], rows["galore_linears"]["counts"]
    for key in ("flops", "kept_bytes", "gradient_bytes"):
        assert ours[key] < theirs[key], key


def test_a_grown_count_would_be_seen():
    """The bar lies close: a layer more, or a rank more, is above it."""
    stored = STORED["arms"]["layerpeft"]["counts"]
    arms = {"layerpeft": {"select": "last:4", "r": 8}, "more": {"arm": "layerpeft", "select": "last:3", "r": 9}}
    options = Options(GUARD.options.model, GUARD.options.batch, arms, "layerpeft", GUARD.options.setting, 0)
    for label in arms:
        found = counted(options, label)
        for key in ("trainable", "flops", "gradient_bytes", "optimizer_bytes"):
            assert found[key] > stored[key] * ROOM, (label, key)


@pytest.fixture(scope="module")
def cut() -> dict[str, dict[str, int]]:
    """The arms of `backward_cut` that the claims are about, counted at their shape and length, over one row."""
    torch.manual_seed(0)
    options = load("backward_cut").options
    options = replace(options, batch=replace(options.batch, rows=1))
    return {label: counted(options, label) for label in ("peft_layers", "layerpeft", "torch_lora")}


@pytest.mark.slow  # tests/training/test_counts.py holds the same at a small shape
def test_the_cut_halves_the_operations_of_layers_to_transform(cut):
    assert cut["layerpeft"]["flops"] <= 0.55 * cut["peft_layers"]["flops"]
    assert cut["layerpeft"]["flops"] == cut["torch_lora"]["flops"]


@pytest.mark.slow
def test_live_bytes_are_those_of_a_hand_written_loop(cut):
    for key in ("kept_bytes", "peak_bytes"):
        assert cut["layerpeft"][key] <= 1.05 * cut["torch_lora"][key]
        assert cut["layerpeft"][key] < cut["peft_layers"][key]


def test_with_all_layers_selected_every_count_is_plain_peft_s():
    assert STORED["arms"]["layerpeft_all"]["counts"] == STORED["arms"]["peft_all"]["counts"]


def test_the_results_checked_in_are_within_the_bars():
    """What README and changelog claim; a new run that misses a bar must not be checked in unseen."""
    arms = {
        name: result(name)["arms"] for name in ("backward_cut", "trl_sft", "overhead_cut", "overhead_cut_checkpointed")
    }
    for name in ("backward_cut", "trl_sft"):
        ours, plain = arms[name]["layerpeft"], arms[name]["peft_layers"]
        assert ours["counts"]["flops"] <= 0.55 * plain["counts"]["flops"], name
        assert ours["time"]["median"] <= 0.62, name
    for name in ("overhead_cut", "overhead_cut_checkpointed"):
        ours, by_hand = arms[name]["layerpeft"]["counts"], arms[name]["torch_lora"]["counts"]
        assert ours["flops"] == by_hand["flops"] and ours["peak_bytes"] <= 1.05 * by_hand["peak_bytes"], name
    assert result("overhead_all")["arms"]["layerpeft"]["time"]["median"] <= 1.02
    scan = result("scan")["scan"]
    assert scan["probe"]["time"]["median"] <= 1.3 and scan["probe"]["gradient_share"] <= 0.03


def test_projection_as_checked_in_is_within_the_bars():
    rows = result("projection")["arms"]
    ours, theirs = rows["layerpeft_galore"], rows["galore_linears"]["counts"]
    assert ours["counts"]["kept_bytes"] <= 0.82 * theirs["kept_bytes"]
    assert ours["worst_kept_bytes"] <= 0.87 * theirs["kept_bytes"]
    assert ours["counts"]["gradient_bytes"] <= 0.12 * theirs["gradient_bytes"]
    assert ours["time"]["median"] <= 0.9
    assert result("refresh")["arms"]["sketch"]["refresh"]["median"] <= 1.5
    over = result("learning")["arms"]["sketch"]["over"]
    assert min(over["svd"], over["galore_torch"]) >= 0.97


def test_wrapping_as_checked_in_is_no_slower_than_pefts():
    found = result("wrapping")["wrapping"]["all layers"]
    assert found["fastest"] <= 1.0 and found["calls"] <= 1.005


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
