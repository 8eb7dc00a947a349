"""The kinds of cases about shorter models: what they measure, and what is wrong with them."""

from __future__ import annotations

import pytest

from benchmarks import case
from benchmarks.kinds import dropping, exits
from layerpeft.errors import ConfigError

DROPPING = """
title: t
about: a
kind: dropping
place: 1
model: {shipped: llama-6m}
batch: {rows: 2, length: 128, text: gsm8k}
lr: 0.005
r: 2
steps: 1
scored: 1
held_out: 2
drops: {nothing: null, removal: {keep: 75%}, last: "last:1"}
"""
EXITS = (
    DROPPING.replace("dropping", "exits").replace("scored: 1\n", "").partition("drops:")[0]
    + "seeds: [0]\nexits: [2, {}]\n"
)


def loaded(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return case.load(str(tmp_path / "mine.yaml"))


@pytest.mark.usefixtures("shallow")
def test_layers_go_and_what_is_left_is_healed(tmp_path):
    mine = loaded(tmp_path, DROPPING)
    result = dropping.measure(mine, lambda _: None) | {"case": mine.given}
    runs = result["runs"]
    assert [len(run["gone"]) for run in runs.values()] == [0, 1, 1] and runs["last"]["gone"] == [4]
    assert runs["nothing"]["losses"][0] == pytest.approx(result["whole"], abs=1e-4) != runs["last"]["losses"][0]
    assert all(before != after for run in runs.values() for before, after in [run["losses"]])
    text = dropping.tables(result)
    assert all(f"`{label}`" in text for label in runs) and f"{result['whole']:.3f}" in text
    with pytest.raises(ConfigError, match="unknown scorer 'removl'"):
        loaded(tmp_path, DROPPING.replace("{keep: 75%}", "{by: removl, keep: 75%}"))


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_exits_are_read_from_three_ways_to_train_them(tmp_path):
    mine = loaded(tmp_path, EXITS.replace("{}", "5"))
    result = exits.measure(mine, lambda _: None) | {"case": mine.given}
    assert set(result["runs"]) == set(exits.ARMS)
    read = [values for runs in result["runs"].values() for values in runs]
    assert all(len(values) == 2 for values in read) and len({tuple(v) for v in read}) == 3
    assert exits.tables(result).count("|\n") >= 5 and "2 layers" in exits.tables(result)
    with pytest.raises(ConfigError, match="add 5"):
        loaded(tmp_path, EXITS.replace("{}", "4"))
