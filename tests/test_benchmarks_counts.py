"""Machine-independent counts may not grow: every arm of the case `guard` is counted anew and held against the result checked in."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from benchmarks.arm import Arm, read_arms
from benchmarks.case import RESULTS, load
from benchmarks.kinds.training import Options, Steps
from layerpeft.errors import Problems

GUARD = load("guard")
STORED = json.loads((RESULTS / "guard.json").read_text(encoding="utf-8"))
SAME = all(
    version(p) == v for p, v in STORED["provenance"]["versions"].items() if p in ("torch", "transformers", "peft")
)
ROOM = 1.001 if SAME else 1.03  # other versions may differ a little by themselves


def counted(options: Options, label: str) -> dict[str, int]:
    arms: dict[str, Arm] = {arm.label: arm for arm in read_arms(options.arms, Problems("test"))}
    steps = Steps(arms[label], options, "cpu")
    for _ in range(options.warm_up):
        steps()
    return steps.counts()


@pytest.mark.parametrize("label", list(GUARD.options.arms))
def test_no_count_has_grown(label):
    if label in ("galore_torch", "owlore"):
        pytest.importorskip("galore_torch")
    stored = STORED["arms"][label]["counts"]
    found = counted(GUARD.options, label)
    assert set(found) == set(stored)
    grown = {key: (found[key], bar) for key, bar in stored.items() if found[key] > bar * ROOM}
    assert not grown, "python -m benchmarks.run guard writes new numbers, where they are meant to grow"


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
    """The arms of `backward_cut` that the claims are about, counted at the size of the claims."""
    torch.manual_seed(0)
    return {label: counted(load("backward_cut").options, label) for label in ("peft_layers", "layerpeft", "torch_lora")}


def test_the_cut_halves_the_operations_of_layers_to_transform(cut):
    assert cut["layerpeft"]["flops"] <= 0.55 * cut["peft_layers"]["flops"]
    assert cut["layerpeft"]["flops"] == cut["torch_lora"]["flops"]


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


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
