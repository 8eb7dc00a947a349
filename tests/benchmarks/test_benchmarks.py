"""The benchmark suite: case files, a small case from file to report, what is wrong with a case, and the README."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from benchmarks import case, report, run, table
from benchmarks.arm import read_arms
from benchmarks.kinds.training import Options as Training
from benchmarks.model import SHAPES, Batch, Model
from layerpeft.errors import ConfigError, Problems
from layerpeft.selection import plugins

ROOT = Path(run.__file__).parent
SMALL = Model(shape="llama-4x64")
ROWS = Batch(2, 16)
HEAD = {"title": "a title", "about": "what it does", "kind": "training", "place": 1}
CASE = """
title: A small one
about: Two rows of 16 tokens.
kind: training
place: 5
model: {shape: llama-4x64}
batch: {rows: 2, length: 16}
setting: checkpointed
reference: peft_layers
rounds: 3
warm_up: 1
arms:
  peft_layers: {layers: "last:1", r: 4}
  ours: {arm: layerpeft, select: "last:1", r: 4}
  lisa: {layers: 1, switch_every: 2}
"""


def wrong(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        case.load(str(path))
    return str(caught.value)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", case.names())
def test_every_case_that_ships_loads(name):
    found = case.load(name)
    assert found.name == name
    assert found.kind in plugins.names(case.KINDS)


@pytest.mark.usefixtures("shallow")
def test_there_are_cases_of_all_three_sizes_with_every_arm():
    small, middle, large = (case.load(name) for name in ("backward_cut", "llama6m", "llama2_7b"))
    assert {"full", "peft_all", "peft_layers", "galore_torch", "lisa", "layerpeft"} <= set(small.options.arms)
    assert middle.options.model.shipped == "llama-6m"
    assert large.needs == "accelerator" and not large.options.together
    used = {
        a.name for name in case.names() for a in read_arms(getattr(case.load(name).options, "arms", {}), Problems(""))
    }
    assert used == set(plugins.names("benchmarks.arms"))


def test_an_unknown_case_is_an_error_with_the_nearest_name(capsys):
    assert run.main(["backwardcut"]) == 2
    assert "unknown case 'backwardcut'. Did you mean 'backward_cut'?" in capsys.readouterr().err


def test_an_unknown_arm_is_an_error_with_the_nearest_name(tmp_path):
    assert "arms.peft_al: unknown arm 'peft_al'. Did you mean 'peft_all'?" in wrong(
        tmp_path, CASE.replace("lisa:", "peft_al:")
    )


def test_every_problem_of_a_case_is_reported_at_once(tmp_path):
    text = CASE.replace("rows: 2", "rows: two").replace("llama-4x64", "llama-4x65").replace("r: 4", "rank: 4", 1)
    found = wrong(tmp_path, text.replace("setting: checkpointed", "setting: chekpointed").replace("rounds", "round"))
    for part in (
        "batch.rows: expected a whole number",
        "expected one of plain, checkpointed",
        "Did you mean 'rounds'?",
    ):
        assert part in found
    later = wrong(tmp_path, CASE.replace("llama-4x64", "llama-4x65").replace("r: 4", "rank: 4", 1))
    assert "Did you mean 'llama-4x64'?" in later
    assert "unknown key 'arms.peft_layers.rank'" in later


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kind: training", "kind: trainig", "Did you mean 'training'?"),
        ("reference: peft_layers", "reference: peft_layer", "Did you mean 'peft_layers'?"),
        ("place: 5", "place: first", "place: expected a whole number"),
        ("place: 5", "place: 5\nneeds: acelerator", "Did you mean 'accelerator'?"),
        ("warm_up: 1", "warm_up: 0", "optimizer states have to exist"),
        ("rounds: 3", "rounds: 3\ntraced: true", "write rounds: 0"),
        ("model: {shape: llama-4x64}\n", "", "model: missing"),
        ("{shape: llama-4x64}", "{}", "give one of shape and shipped"),
        ("length: 16}", "length: 16, text: gsm8k}", "real text needs a model with a tokenizer"),
    ],
)
def test_what_is_wrong_with_a_case_is_said(tmp_path, old, new, says):
    assert says in wrong(tmp_path, CASE.replace(old, new))


def test_kinds_say_which_arms_they_can_take(tmp_path):
    assert "lisa has no config for a trainer; those that do: full, layerpeft" in wrong(
        tmp_path, CASE.replace("kind: training", "kind: trainer").replace("setting: checkpointed\n", "")
    )
    head = CASE.partition("setting")[0].replace("kind: training", "kind: growth")
    found = wrong(tmp_path, f"{head}arms: {{full: {{}}}}\nsweeps: {{layer: [1], rank: []}}\n")
    for part in ("full takes no layers", "'layer' is not one of layers", "sweeps.rank: expected a list"):
        assert part in found


# ---- from a case to the report ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "small_one.yaml").write_text(CASE, encoding="utf-8")
    assert run.main([str(folder / "small_one.yaml"), "--out", str(folder / "results")]) == 0
    return folder


def test_a_case_becomes_a_json_with_everything_in_it(results):
    found = json.loads((results / "results" / "small_one.json").read_text(encoding="utf-8"))
    assert found["name"] == "small_one" and found["case"]["arms"]["ours"]["arm"] == "layerpeft"
    origin = found["provenance"]
    assert set(origin) == {"commit", "uncommitted_changes", "versions", "machine", "threads", "clock", "seed"}
    assert origin["versions"]["torch"] == torch.__version__
    assert set(origin["machine"]) == {"processor", "architecture", "cores", "memory_gib", "accelerator"}
    for label in ("peft_layers", "ours", "lisa"):
        row = found["arms"][label]
        assert set(row["counts"]) == {
            *("trainable", "flops", "kept_bytes", "peak_bytes", "gradient_bytes", "optimizer_bytes", "weight_bytes"),
            "together_bytes",
        }
        assert all(value > 0 for value in row["counts"].values())
        assert row["time"]["min"] <= row["time"]["lower"] <= row["time"]["median"] <= row["time"]["upper"]
    assert found["arms"]["peft_layers"]["time"]["median"] == 1.0
    text = json.dumps(found)
    assert str(Path.home()) not in text and str(ROOT) not in text


@pytest.mark.pictures
def test_a_result_is_rendered_with_table_chart_and_origin(results, capsys):
    readme = results / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n", encoding="utf-8")
    assert report.main(["--results", str(results / "results"), "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "### A small one" in text and "`python -m benchmarks.run small_one`" in text
    assert "| `ours` |" in text and "torch 2" in text
    picture = (results / "charts" / "small_one.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert "](charts/small_one.png)" in text
    assert report.between(text).startswith("### A small one")


def test_a_result_that_no_case_wrote_is_refused(tmp_path, capsys):
    (tmp_path / "odd.json").write_text("{}", encoding="utf-8")
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "odd.json was not written by benchmarks.run: it lacks name" in capsys.readouterr().err


def test_a_file_without_markers_is_refused():
    with pytest.raises(ConfigError, match="needs the two lines"):
        report.insert("nothing here", "text")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_case_that_needs_an_accelerator_is_passed_over(tmp_path, capsys):
    assert run.main(["llama2_7b", "--out", str(tmp_path)]) == 0
    assert "llama2_7b: skipped: needs an accelerator" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_arm_whose_package_is_missing_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "galore_torch", None)
    path = tmp_path / "c.yaml"
    path.write_text(
        CASE.replace("lisa: {layers: 1, switch_every: 2}", "galore_torch: {rank: 4}").replace("3\n", "0\n", 1)
    )
    run.run(case.load(str(path)), tmp_path)
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert found["arms"]["galore_torch"]["skipped"] == "needs the package galore-torch (pip install galore-torch)"
    assert "pip install galore-torch" in report.section(found, False)


def test_arms_that_do_not_fit_beside_each_other_are_measured_one_by_one(tmp_path, monkeypatch):
    """What large models need; an arm that runs out of memory says so in its row."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(plugins.get("benchmarks.arms", "lisa"), "build", full)
    path = tmp_path / "c.yaml"
    path.write_text(CASE.replace("rounds: 3", "rounds: 3\ntogether: false"), encoding="utf-8")
    run.run(case.load(str(path)), tmp_path)
    rows = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["arms"]
    assert rows["lisa"]["skipped"] == "out of memory"
    assert rows["ours"]["counts"]["flops"] < rows["peft_layers"]["counts"]["flops"]
    assert rows["peft_layers"]["time"]["median"] == 1.0 and rows["ours"]["time"]["median"] > 0
    assert ("accelerator_peak_bytes" in rows["ours"]) is torch.accelerator.is_available()


def test_the_allocator_s_peak_has_a_column():
    rows = {"a": {"counts": {"flops": 10}, "accelerator_peak_bytes": 21 * 2**30}, "b": {"skipped": "out of memory"}}
    lines = table.arms(rows, "a").splitlines()
    assert lines[0] == "| arm | operations | allocator's peak |"
    assert lines[2:] == ["| `a` | 1.000 | 21.0 GiB |", "| `b` | out of memory |  |"]


def test_trl_s_trainer_is_counted_from_inside(tmp_path):
    text = (
        CASE.replace("kind: training", "kind: trainer")
        .replace("setting: checkpointed\n", "")
        .replace("rounds: 3", "rounds: 0")
    )
    path = tmp_path / "t.yaml"
    path.write_text(text.partition("  lisa")[0], encoding="utf-8")
    run.run(case.load(str(path)), tmp_path)
    rows = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["arms"]
    plain, ours = rows["peft_layers"]["counts"], rows["ours"]["counts"]
    assert ours["trainable"] == plain["trainable"] > 0
    assert ours["flops"] < 0.7 * plain["flops"]
    assert 0 < ours["peak_bytes"] < plain["peak_bytes"]


# ---- the README ------------------------------------------------------------------------------------------------------


def test_every_number_of_the_readme_comes_from_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.between(text) == report.render(report.read_results(), ROOT / "charts").strip()


def test_every_chart_of_the_readme_is_there_and_can_be_read():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {part.partition(")")[0] for part in text.split("](charts/")[1:]}
    assert named == {path.name for path in (ROOT / "charts").glob("*.png")} and named
    for name in named:
        data = (ROOT / "charts" / name).read_bytes()
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert width > 600 and height > 250 and len(data) < 400_000


def test_results_name_no_place_of_a_machine():
    for path in (ROOT / "results").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not any(f"/{place}/" in text for place in ("home", "root", "tmp", "opt", "work")), path.name


# ---- the house -------------------------------------------------------------------------------------------------------

FILES = sorted(p for p in ROOT.rglob("*.py"))


def test_files_and_functions_stay_small_and_siblings_do_not_know_each_other():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert text.count("\n") <= 400 and ast.get_docstring(tree), path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, (path, node.name)
            if isinstance(node, ast.ImportFrom) and path.parent.name in ("arms", "kinds"):
                assert not (node.module or "").startswith(f"benchmarks.{path.parent.name}"), path


def test_options_have_defaults_that_a_case_can_leave_out():
    for name in plugins.names("benchmarks.arms"):
        module = plugins.get("benchmarks.arms", name)
        assert module.Options() is not None and module.__doc__.endswith((".", ". ")), name
    assert Training(SMALL, ROWS, {}, "full").warm_up >= 1
    assert set(SHAPES) >= {"llama-12x384", "llama-2-7b", "llama-3-8b"}
