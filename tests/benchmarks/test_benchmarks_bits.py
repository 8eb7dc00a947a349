"""The kind `bits`: rows, units and shares, a small case from file to table; and what the result checked in says."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from benchmarks import case, model, run
from benchmarks.kinds import bits
from layerpeft.errors import ConfigError
from layerpeft.model import rounding
from layerpeft.quantization.budget import mean_bits, total_bytes

SMALL = """
title: A small one
about: Two rows.
kind: bits
place: 1
model: {shipped: llama-6m}
rows: {length: 16, calibration: 1, held_out: 1, batch: 2}
budgets: [6.0, int8]
choices: [4, 8, 16]
ladder: [nf4, int8, 16bit]
per: [layer]
seeds: [0, 1]
ways:
  by depth: {by: depth}
  by error: {by: quantization_error, precision: int8}
lowered:
  lowest: [by depth, 4, 8]
"""


def test_units_are_layers_or_what_engines_fuse_and_cost_what_they_are_stored_in(llama):
    layers = bits.units_of(llama, "layer", (3, 4))
    groups = bits.units_of(llama, "module", (3, 4))
    assert len(layers) == 12 and len(groups) == 48
    assert [len(u.modules) for u in groups[:4]] == [3, 1, 2, 1]
    assert sum(u.weights for u in layers) == sum(u.weights for u in groups) == 12 * (4 * 192 * 192 + 3 * 192 * 512)
    for units in (layers, groups):
        everywhere = {u.name: "hqq3" for u in units}
        assert mean_bits(units, everywhere) == pytest.approx(3.713, abs=1e-3)


def test_shuffling_keeps_the_bytes_and_the_precisions(llama):
    units = bits.units_of(llama, "module", (2, 3, 4))
    draw = random.Random(0)
    given = {u.name: draw.choice(["hqq2", "hqq3", "nf4"]) for u in units}
    found = bits.shuffled(units, given, random.Random(1))
    assert found != given and Counter(found.values()) == Counter(given.values())
    assert total_bytes(units, found) == total_bytes(units, given)


def test_rows_are_whole_and_the_two_files_have_none_in_common():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder(model.Model(shipped="llama-6m")))
    rows = bits.Rows(length=32, batch=4)
    for text in bits.TEXTS:
        found = [bits.batches(tokenizer, text, split, rows, 40) for split in ("train", "eval")]
        sets = [{tuple(r) for b in part for r in b["input_ids"].tolist()} for part in found]
        assert [len(s) for s in sets] == [40, 40] and not sets[0] & sets[1]
        assert all(b["input_ids"].shape == (4, 32) for part in found for b in part)


@pytest.fixture
def rounded_once(monkeypatch):
    """Each matrix is rounded to each precision once: most of what the ways take."""
    kept = {}

    def once(weight, precision, storage):
        key = (weight.data_ptr(), tuple(weight.shape), precision)
        if key not in kept:
            kept[key] = made(weight, precision, storage)
        return kept[key]

    made = rounding.rounded
    monkeypatch.setattr(rounding, "rounded", once)


def test_a_small_case_becomes_a_table(tmp_path, rounded_once):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    run.run(case.load(str(path)), tmp_path)
    result = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    for budget, most in (("6.0", 6.0), ("int8", 8.144)):
        rows = result["found"]["layer"][budget]["rows"]
        assert {"by depth", "by error", "kl", "random scores, seed 1", "shuffled kl, seed 0"} <= set(rows)
        assert all(most - 0.7 < row["mean_bits"] <= most + 1e-3 for row in rows.values())
    assert {"uniform", "kl, paired", "by depth, paired"} <= set(rows)
    assert rows["by depth"]["bits"].split()[0] == "nf4" and rows["by depth"]["bits"].split()[-1] != "nf4"
    assert rows["lowest"]["bits"] == rows["uniform"]["bits"]
    lowest = result["found"]["layer"]["6.0"]["rows"]["lowest"]["bits"].split()
    assert lowest == ["nf4"] * 8 + ["int8"] * 4, "the fewest for 6 · 12 bits: 4.5 · 7 + 8.14 · 5 is 72.2"
    against = result["found"]["layer"]["int8"]["against"]
    mean = sum(sum(rows[f"random scores, seed {s}"]["loss"].values()) / 2 for s in (0, 1)) / 2
    assert against["uniform"]["random scores"]["gain"] == pytest.approx(
        mean - sum(rows["uniform"]["loss"].values()) / 2, abs=1e-4
    )
    text = bits.tables(result)
    assert text.count("| shared out by |") == 2 and "| by depth, paired |" in text and "random scores, 2 seeds" in text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{by: depth}", "{by: dept}", "ways.by depth: .*Did you mean 'depth'"),
        ("[6.0, int8]", "[6.0, int88]", "'int88' is no number of bits above 0"),
        ("[4, 8, 16]", "[4, 5]", "5 is no precision"),
        ("per: [layer]", "per: [layers]", "Did you mean 'layer'"),
        ("seeds: [0, 1]", "seeds: [0]", "seeds: at least 2"),
        ("[by depth, 4, 8]", "[by dept, 4, 9]", r"(?s)Did you mean 'by depth'.*\[4, 9\] are not two of the choices"),
    ],
)
def test_what_is_wrong_with_a_case_is_said(tmp_path, old, new, says):
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        case.load(str(path))


def test_the_result_checked_in_shows_measured_divergence_ahead_of_uniform_and_of_every_random_seed():
    found = json.loads((case.RESULTS / "bits.json").read_text(encoding="utf-8"))["found"]
    for per in bits.PER:
        rows, against = found[per]["hqq3"]["rows"], found[per]["hqq3"]["against"]
        for label in ("kl", "kl, paired", "quantization_error, inputs"):
            assert rows[label]["mean_bits"] <= rows["uniform"]["mean_bits"]
            assert against[label]["uniform"]["gain"] > 0.01
            assert against[label]["random scores"]["seeds_beaten"] == 5
        assert against["outliers"]["uniform"]["gain"] < 0, "said in the README: outliers is behind uniform there"
        assert found[per]["3.0"]["against"]["kl"]["random scores"]["seeds_beaten"] == 5
