"""The experiment on layers: it goes on where it was interrupted, makes no run twice, and its tables count right."""

from __future__ import annotations

import json
import re
from itertools import combinations

import numpy as np
import pytest

from benchmarks.evidence import charts, chosen, made, page, run, stats, tables
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.design import DESIGN, load
from benchmarks.evidence.found import cells
from benchmarks.evidence.store import Store
from layerpeft.errors import ConfigError
from layerpeft.recipe.tasks.metrics import spearman
from layerpeft.recipe.yaml import parse

CELL = "gpt/words"
DESIGNED = """
registered: 2026-01-01
about: a test
models:
  gpt: {made: gpt2, layers: 3, width: 16, heads: 2, mlp: 32, steps: 2, rows: 2, length: 16}
tasks:
  words: {train: rows.jsonl, eval: rows.jsonl, text: "{a} {b}", rows: 2, length: 16, held_out: 4}
cells: [gpt/words]
training: {r: 4, rates: [0.01], steps: 2}
oracle: {seeds: [0, 1], keep: 1, sets: 2, more: {gpt/words: 3}, pairs: [gpt/words]}
criteria:
  seeds: [0, 1]
  num_batches: 2
  scores: {depth: {by: depth}, gradient norm: {by: gradient_norm}}
  products: {both: [depth, gradient norm]}
  rules: {first and last: {by: depth, pick: outside}}
final: {seeds: [0, 1], half: 2, shares: [0.5, 0.97], criteria: [both], cells: [gpt/words]}
matched:
  seeds: [0, 1]
  steps: 2
  epochs: 2
  lengths: [1, 2]
  cells: [gpt/words]
choices: {half: {criterion: depth, count: 2}, part: {criterion: both, share: 0.9}}
method_cells: [gpt/words]
methods:
  GaLore: {method: galore, select: "stride:1", options: {r: 4, update_proj_gap: 2}, rates: [0.001, 0.01]}
retention: {text: books.txt, rows: 2, length: 16}
pretraining: {text: books.txt, held_out: books.txt}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "design.yaml").write_text(DESIGNED)
    rows = [{"a": f"word {i}", "b": "and another one " * (i % 3 + 1)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "books.txt").write_text("A whale came up out of the sea and looked around. " * 40)
    return folder


def words(place, *more):
    own = ["--design", str(place / "design.yaml"), "--results", str(place / "results"), "--data", str(place)]
    return [*own, "--made", str(place / "made"), *more]


@pytest.mark.pictures
def test_it_goes_on_where_it_was_interrupted_and_makes_no_run_twice(place, capsys, monkeypatch):
    monkeypatch.setattr(stats, "DRAWS", 20)
    assert main(words(place, "run")) == 2 and "gpt is not made yet" in capsys.readouterr().err
    assert main(words(place, "pretrain")) == 0
    store, design = Store(place / "results"), load(place / "design.yaml")
    write, left = Store.write, [9]

    def stops(self, one, result):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, one, result)

    monkeypatch.setattr(Store, "write", stops)
    assert main(words(place, "run")) == 130
    monkeypatch.setattr(Store, "write", write)
    before = store.path(CELL).read_text()
    assert before.count("\n") == len(store.lines(CELL)) == 9
    torn = before + '{"run": {"cell": "gpt/wo'
    store.path(CELL).write_text(torn)
    assert main(words(place, "run")) == 0
    text = store.path(CELL).read_text()
    assert text.startswith(torn + "\n")
    keys = [
        json.dumps(json.loads(line)["run"], sort_keys=True)
        for line in text.splitlines()
        if line != torn.splitlines()[-1]
    ]
    assert len(keys) == len(set(keys)) == len(store.lines(CELL))
    at = chosen.setting(design, CELL, store.lines(CELL))
    assert at is not None and set(at.rates) == {1, 2, 3} and set(at.rates.values()) == {0.01}
    assert at.run([0], 0).lr == at.rates[1] and at.run([0, 2], 0).lr == at.rates[2]
    wanted = {one.key for part in (run.scores, run.tuned) for one in part(design, CELL)}
    wanted |= {one.key for part in (run.oracle, run.more) for one in part(at)}
    assert wanted < set(keys)
    judged = {
        (line["run"]["seed"], len(line["run"]["select"]), line["run"]["r"])
        for line in store.lines(CELL).values()
        if line["run"]["method"] == "lora"
    }
    assert {(0, 2, 2), (1, 3, 1)} <= judged, "half of the layers at half the rank, all at a third"
    capsys.readouterr()
    assert main(words(place, "run")) == 0 and store.path(CELL).read_text() == text
    for name in tables.TABLES:
        assert main(words(place, "table", name)) == 0
        assert f"| {CELL} |" in capsys.readouterr().out
    assert main(words(place, "table", "regret", "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["budget"] for row in rows} == set(chosen.BUDGETS) and all(row["seeds"] == 2 for row in rows)
    page_of_cell(place, rows)
    pictures = place / "pictures"
    assert main(words(place, "chart", "--out", str(pictures))) == 0
    assert {path.name for path in pictures.iterdir()} == {f"evidence-{name}.png" for name in charts.CHARTS}
    assert main(words(place, "advice", "--out", str(place / "advice.json"))) == 0
    told = json.loads((place / "advice.json").read_text())
    assert [one["name"] for one in told["criteria"]] == ["depth", "gradient norm"] or len(told["criteria"]) == 2
    assert [one["name"] for one in told["methods"]] == ["GaLore"] and told["methods"][0]["steps"] == [1.0, 1.0, 1.0]
    kept = {one["rule"]: one for one in told["kept"]}
    assert kept["all"]["steps"] == kept["all"]["time"] == [1.0, 1.0, 1.0]
    last = [row for row in rows if row["choice"] == "depth" and row["budget"] == "count"]
    assert [row["cell"] for row in last] == [CELL]


def page_of_cell(place, rows):
    """The page's tables are those of its figures, and the rest of it stays."""
    text, figures = place / "page.md", place / "figures.json"
    asked = [
        "regret choice share budget=time",
        "regret choice gain,seeds budget=time",
        "retention trained forgets trained~^(?!layer)",
    ]
    text.write_text("before\n" + "".join(f"<!-- evidence: {one} -->\nold\n<!-- end -->\n" for one in asked) + "after\n")
    assert main(words(place, "page", "--figures", str(figures), "--out", str(text))) == 0
    known = json.loads(figures.read_text())
    assert set(known) == set(tables.TABLES) and known["regret"] == rows
    made = text.read_text()
    assert made.startswith("before\n") and made.endswith("after\n") and "old" not in made and "| layer 0" not in made
    whole = next(row for row in rows if (row["choice"], row["budget"]) == ("all", "time"))
    assert f"| choice | {CELL} |" in made and f"| all | {stats.said(whole['share'])} |" in made
    assert f"| all | {stats.said(whole['gain'])} | 2 |" in made
    assert page.filled(made, known) == made
    text.write_text("<!-- evidence: regert choice share -->\n<!-- end -->\n")
    before = figures.read_bytes()
    assert main(words(place, "page", "--figures", str(figures), "--out", str(text))) == 2
    assert figures.read_bytes() == before


def test_two_processes_share_the_runs(place):
    store, one = Store(place / "claims"), run.Run(CELL, "score", 0, {"by": "depth"})
    with store.claim(one) as mine:
        assert mine
        with store.claim(one) as other:
            assert not other
        store.write(one, {"scores": [1.0]})
    with store.claim(one) as again:
        assert not again


def test_the_design_that_ships_is_sound(tmp_path):
    design = load(DESIGN)
    for cell in design.cells:
        assert len(run.sets(design, cell)) == len(set(run.sets(design, cell))) == design.num_sets(cell)
    assert run.sets(design, "llama/gsm8k") == run.sets(design, "llama/gsm8k") != run.sets(design, "llama/trec")
    at = run.Setting(design, "llama/gsm8k", {12: 0.01})
    keys = [one.key for part in (run.oracle, run.more) for one in part(at)]
    assert len(set(keys)) >= 3 * (1 + 12 + 60 + 66)
    data = parse(DESIGN.read_text()).data
    assert set(data["final"]["criteria"]) <= {*data["criteria"]["scores"], *data["criteria"]["products"]}
    wrong = tmp_path / "design.yaml"
    wrong.write_text(
        DESIGNED.replace("cells: [gpt/words]\ntraining", "cells: [gtp/words]\ntraining").replace(
            "criteria: [both]", "criteria: [deep]"
        )
    )
    with pytest.raises(ConfigError) as told:
        load(wrong)
    assert "Did you mean 'gpt'" in str(told.value) and "final.criteria" in str(told.value)


def test_what_is_left_out_is_told_by_layers_and_by_pairs_only_as_far_as_these_are_all_there_is():
    draw = np.random.default_rng(0)
    own, both = draw.normal(size=6), np.triu(draw.normal(size=(6, 6)), 1)
    sets = [s for size in (1, 2, 3) for s in combinations(range(6), size)]
    added = np.array([own[list(s)].sum() + 5 * len(s) ** 0.5 for s in sets])
    crossed = added + np.array([both[np.ix_(s, s)].sum() for s in sets])
    errors = {
        (kind, pairs): np.abs(stats.left_out(sets, 6, pairs)(gains) - gains).max()
        for kind, gains in (("added", added), ("crossed", crossed)) for pairs in (False, True)
    }  # fmt: skip
    assert errors["added", False] < 0.01 and errors["crossed", True] < 0.2 < errors["crossed", False]
    table = np.array([[len(s) == n for n in (1, 2, 3)] + [i in s for i in range(6)] for s in sets], float)
    paid = np.diag([0.0] * 3 + [stats.PENALTIES[0]] * 6)
    rest = table[1:]  # by hand, of the first set, at the least penalty, which is the best where nothing is noise
    alone = np.linalg.solve(rest.T @ rest + paid, rest.T @ added[1:]) @ table[0]
    assert stats.left_out(sets, 6, False)(added)[0] == pytest.approx(alone, rel=1e-9)


def test_numbers_by_hand():
    assert spearman([1, 2, 3], [10, 20, 30]) == 1 and spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    worth = np.array([0.1, 0.5, -0.2, 0.3])
    sets = [(i, j) for i in range(4) for j in range(i)]
    found = stats.effects(sets, [worth[list(s)].sum() + 7 for s in sets], 4)
    assert found == pytest.approx(worth - worth.mean())
    mean, low, high = stats.interval([0, 1, 2, 3], lambda s: sum(s) / len(s))
    assert mean == 1.5 and 0 <= low < 1.5 < high <= 3
    assert stats.said(stats.interval([0], lambda s: 2.0)) == "2.00"
    assert stats.across([([0, 0], lambda s: 1.0), ([1, 1], lambda s: 4.0)]) == (2.5, 2.5, 2.5)
    assert stats.reached([1, 2, 4], [3.0, 2.0, 1.0], 1.5) == 3 and stats.reached([1, 2], [3.0, 2.0], 3.5) == 1
    assert stats.said(stats.interval([0, 1], lambda s: stats.reached([1], [3.0], 1.0))) == "never (never to never)"
    assert chosen.top([0.1, 0.9, 0.9, 0.2], 2) == (1, 2) and chosen.top([1, 1, 1], 2) == (0, 1)
    assert chosen.together([[1, 2, 3], [3, 2, 1]]) == (1.0, 1.0, 1.0) and chosen.ranks([5, 1, 5]) == [1.5, 0.0, 1.5]


def test_a_made_model_learns_and_is_the_same_again(place):
    design = load(place / "design.yaml")
    from safetensors.torch import load_file

    first, again = (
        load_file(made.pretrain(design, "gpt", place, place / name) / "model.safetensors") for name in ("m1", "m2")
    )
    assert first.keys() == again.keys() and all(first[k].equal(again[k]) for k in first)


def test_the_page_says_what_its_figures_say():
    """Its tables, and every number with a decimal in its words."""
    known, text = json.loads(page.FIGURES.read_text()), page.PAGE.read_text()
    assert page.filled(text, known) == text
    there = {number for rows in known.values() for row in rows for value in row.values() for number in numbers(value)}
    words = page.BLOCK.sub("", text)
    said = set(re.findall(r"(?<![\w.])\d*\.\d+", words))
    assert len(said) > 10 and {float(one) for one in said} <= there, sorted({float(one) for one in said} - there)


def test_what_is_said_of_the_cell_that_ends_with_its_rates_and_of_hours_is_in_the_results():
    lines = list(Store().lines("llama/mr").values())
    ends = [[line["after"][key] for line in lines] for key in ("loss", "accuracy")]
    words = " ".join(page.PAGE.read_text().split())
    assert f"(held-out losses of {min(ends[0]):.2f} to {max(ends[0]):.2f} where a coin has {np.log(2):.2f}" in words
    assert f"at most {100 * max(ends[1]):.0f} % right" in words and len(lines) == 18
    seconds = sum(
        json.loads(line).get("seconds") or 0
        for path in (page.FIGURES.parent).glob("*.jsonl") for line in path.read_text().splitlines()
    )  # fmt: skip
    about = (page.FIGURES.parents[1] / "README.md").read_text()
    assert f"took {seconds / 3600:.1f} hours of one thread" in " ".join(about.split())


def numbers(value):
    """A value of a table as words may give it: of an interval its mean and ends, to two digits."""
    if isinstance(value, list):
        return {number for one in value for number in numbers(one)}
    return {round(abs(value), 2), round(abs(value), 1)} if isinstance(value, float) else set()


@pytest.mark.slow
def test_the_figures_are_those_of_the_results():
    """Of the cell whose rows and model ship."""
    found = next(f for f in cells(load(DESIGN), Store(), None, made.folder(), ["llama/gsm8k"]))
    known = json.loads(page.FIGURES.read_text())
    for name in tables.TABLES:
        own = [row for row in tables.plain(name, [found]) if row["cell"] == found.name]
        assert own == [row for row in known[name] if row["cell"] == found.name]
