"""The benchmark suite: case files, a small case from file to report, what its arms and counts are made of."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import case, chart, clock, count, report, run, table
from benchmarks.arm import Arm, Ready, adamw, read_arms
from benchmarks.kinds.training import Options as Training
from benchmarks.model import SHAPES, Batch, Model, batches, build
from benchmarks.setting import prepare
from benchmarks.trace import traced
from layerpeft import registry
from layerpeft.errors import ConfigError, Problems

ROOT = Path(run.__file__).parent
SMALL = Model(shape="llama-12x64")
ROWS = Batch(2, 16)
HEAD = {"title": "a title", "about": "what it does", "kind": "training", "place": 1}
CASE = """
title: A small one
about: Two rows of 16 tokens.
kind: training
place: 5
model: {shape: llama-12x64}
batch: {rows: 2, length: 16}
setting: checkpointed
reference: peft_layers
rounds: 3
warm_up: 1
arms:
  peft_layers: {layers: "last:3", r: 4}
  ours: {arm: layerpeft, select: "last:3", r: 4}
  lisa: {layers: 2, switch_every: 2}
"""


def arm(name: str, **options) -> Arm:
    problems = Problems("test")
    found = read_arms({name: options}, problems)
    problems.raise_if_any(ConfigError)
    return found[0]


def ready(name: str, setting: str = "plain", **options) -> Ready:
    return prepare(arm(name, **options).build(build(SMALL)), setting)


def batch() -> dict[str, torch.Tensor]:
    return batches(SMALL, ROWS, 256)[0]


def wrong(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        case.load(str(path))
    return str(caught.value)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", case.names())
def test_every_case_that_ships_loads(name):
    found = case.load(name)
    assert found.name == name
    assert found.kind in registry.names(case.KINDS)


def test_there_are_cases_of_all_three_sizes_with_every_arm():
    small, middle, large = (case.load(name) for name in ("backward_cut", "llama6m", "llama2_7b"))
    assert {"full", "peft_all", "peft_layers", "galore_torch", "lisa", "layerpeft"} <= set(small.options.arms)
    assert middle.options.model.shipped == "llama-6m"
    assert large.needs == "accelerator" and not large.options.together
    used = {
        a.name for name in case.names() for a in read_arms(getattr(case.load(name).options, "arms", {}), Problems(""))
    }
    assert used == set(registry.names("benchmarks.arms"))


def test_an_unknown_case_is_an_error_with_the_nearest_name(capsys):
    assert run.main(["backwardcut"]) == 2
    assert "unknown case 'backwardcut'. Did you mean 'backward_cut'?" in capsys.readouterr().err


def test_an_unknown_arm_is_an_error_with_the_nearest_name(tmp_path):
    assert "arms.peft_al: unknown arm 'peft_al'. Did you mean 'peft_all'?" in wrong(
        tmp_path, CASE.replace("lisa:", "peft_al:")
    )


def test_every_problem_of_a_case_is_reported_at_once(tmp_path):
    text = CASE.replace("rows: 2", "rows: two").replace("llama-12x64", "llama-12x65").replace("r: 4", "rank: 4", 1)
    found = wrong(tmp_path, text.replace("setting: checkpointed", "setting: chekpointed").replace("rounds", "round"))
    for part in (
        "batch.rows: expected a whole number",
        "expected one of plain, checkpointed",
        "Did you mean 'rounds'?",
    ):
        assert part in found
    later = wrong(tmp_path, CASE.replace("llama-12x64", "llama-12x65").replace("r: 4", "rank: 4", 1))
    assert "Did you mean 'llama-12x64'?" in later
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
        ("model: {shape: llama-12x64}\n", "", "model: missing"),
        ("{shape: llama-12x64}", "{}", "give one of shape and shipped"),
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
        CASE.replace("lisa: {layers: 2, switch_every: 2}", "galore_torch: {rank: 4}").replace("3\n", "0\n", 1)
    )
    run.run(case.load(str(path)), tmp_path)
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert found["arms"]["galore_torch"]["skipped"] == "needs the package galore-torch (pip install galore-torch)"
    assert "pip install galore-torch" in report.section(found, False)


def test_arms_that_do_not_fit_beside_each_other_are_measured_one_by_one(tmp_path, monkeypatch):
    """What large models need; an arm that runs out of memory says so in its row."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(registry.get("benchmarks.arms", "lisa"), "build", full)
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
        assert not any(place in text for place in ("/home/", "/root/", "/tmp/", "/opt/", "/work/")), path.name


# ---- arms ------------------------------------------------------------------------------------------------------------


def test_the_large_shapes_are_those_of_the_published_models():
    published = {"llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248}
    for shape, parameters in published.items():
        model = build(Model(shape=shape, dtype="bfloat16"), "meta")
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.dtype == torch.bfloat16


def test_lisa_switches_blocks_and_lets_every_one_move():
    ours = ready("lisa", layers=3, switch_every=2)
    start = {n: p.detach().clone() for n, p in ours.model.named_parameters()}
    chosen = []
    for number in range(12):
        count.step(ours, batch(), number)
        blocks = ours.model.get_submodule("model.layers")
        chosen.append(tuple(i for i, b in enumerate(blocks) if next(b.parameters()).requires_grad))
    assert all(len(c) == 3 for c in chosen)
    assert all(chosen[i] == chosen[i + 1] for i in range(0, 12, 2)) and len(set(chosen)) >= 4
    moved = {n for n, p in ours.model.named_parameters() if not torch.equal(p, start[n])}
    seen = {i for c in chosen for i in c}
    blocks_moved = {int(n.split(".")[2]) for n in moved if n.startswith("model.layers.")}
    assert blocks_moved == seen
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= moved


def test_lisa_gives_back_the_states_of_frozen_blocks_unless_told_to_keep_them():
    kept = {}
    for keep in (False, True):
        ours = ready("lisa", layers=2, switch_every=1, keep_states=keep)
        for number in range(4):
            count.step(ours, batch(), number)
        kept[keep] = count.optimizer_bytes(ours.optimizer, ours.model)
        if not keep:
            active = sum(p.numel() for p in ours.model.parameters() if p.requires_grad)
            tensors = sum(1 for p in ours.model.parameters() if p.requires_grad)
            assert kept[keep] == 8 * active + 4 * tensors  # two moments, and the number of the step
    assert kept[True] > kept[False]


def test_galore_s_projections_count_as_optimizer_states_and_can_fall_due():
    pytest.importorskip("galore_torch")
    ours = ready("galore_torch", rank=8)
    count.step(ours, batch(), 0)
    projected = [s for s in ours.optimizer.state.values() if "projector" in s]
    assert len(projected) == 12 * 7
    # in float32 the package keeps a view of all singular vectors, and with it all of them
    inside = sum(s["projector"].ortho_matrix.untyped_storage().nbytes() for s in projected)
    assert inside > sum(s["projector"].ortho_matrix.numel() * 4 for s in projected)
    moments = sum(2 * s["exp_avg"].numel() * 4 for s in ours.optimizer.state.values())
    assert count.optimizer_bytes(ours.optimizer, ours.model) == inside + moments
    before = projected[0]["projector"].ortho_matrix.clone()
    count.step(ours, batch(), 1)
    assert torch.equal(before, projected[0]["projector"].ortho_matrix)
    ours.refresh()
    count.step(ours, batch(), 2)
    assert not torch.equal(before, projected[0]["projector"].ortho_matrix)


def test_owlore_projects_the_active_blocks_alone():
    pytest.importorskip("galore_torch")
    ours = ready("owlore", layers=2, rank=8, switch_every=50)
    count.step(ours, batch(), 0)
    assert len([s for s in ours.optimizer.state.values() if "projector" in s]) == 2 * 7


@pytest.mark.parametrize("setting", ["plain", "checkpointed"])
def test_hand_written_lora_is_plain_peft_s(setting):
    by_hand, peft = ready("torch_lora", setting), ready("peft_layers", setting)
    theirs = {n.replace("base_model.model.", "llama."): p for n, p in peft.model.named_parameters() if p.requires_grad}
    own = {n: p for n, p in by_hand.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in own.items():
            other = theirs[
                name.replace(".A.weight", ".lora_A.default.weight").replace(".B.weight", ".lora_B.default.weight")
            ]
            other.copy_(parameter.normal_(std=0.02))
    losses = [r.model(**batch()).loss for r in (by_hand, peft)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    grads = [torch.cat([p.grad.flatten() for p in group.values()]) for group in (own, theirs)]
    assert len(own) == 2 * 7 * 3 and torch.allclose(sorted_norms(own), sorted_norms(theirs), rtol=1e-4)
    assert torch.allclose(grads[0].norm(), grads[1].norm(), rtol=1e-5)


def sorted_norms(group: dict[str, nn.Parameter]) -> torch.Tensor:
    return torch.stack([p.grad.norm() for p in group.values()]).sort().values


# ---- counts and times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "peft_layers", "layerpeft", "lisa", "torch_lora"])
def test_tracing_counts_what_a_real_step_counts(name):
    real = ready(name, "checkpointed")
    count.step(real, batch(), 0)
    real = count.counts(real, batch(), 1)
    shadow = traced(arm(name), SMALL, ROWS, lambda r: prepare(r, "checkpointed"))
    for key in ("trainable", "flops", "gradient_bytes"):
        assert shadow[key] == real[key], key
    for key in ("kept_bytes", "peak_bytes", "optimizer_bytes", "weight_bytes"):
        assert shadow[key] == pytest.approx(real[key], rel=0.05), key


def test_operations_are_those_of_the_matrix_products():
    linear, x = nn.Linear(6, 5, bias=False), torch.randn(7, 6)
    assert count.counted(lambda: linear(x), [linear.weight, x]).flops == 2 * 7 * 6 * 5
    query = torch.randn(1, 2, 4, 8)
    attention = nn.functional.scaled_dot_product_attention
    assert count.counted(lambda: attention(query, query, query), [query]).flops == 2 * (2 * 2 * 4 * 4 * 8)


def test_live_bytes_are_those_alive_at_once():
    x = torch.zeros(256)

    def one_after_the_other() -> None:
        for _ in range(3):
            _ = x + 1

    def all_at_once() -> None:
        held = [x + 1 for _ in range(3)]
        assert held

    assert count.counted(all_at_once, [x]).peak == 3 * 1024
    assert count.counted(one_after_the_other, [x]).peak <= 2 * 1024


def test_numbers_without_a_dimension_of_tokens_are_told_from_activations():
    weight, x = torch.randn(6, 5), torch.randn(7, 6)
    with count.WithoutTokens([weight, x], (7,)) as watch:
        y = x @ weight  # (7, 5): an activation
        gradient = x.T @ y  # (6, 5)
        del gradient
        sketch = torch.randn(2, 7) @ y  # (2, 5)
    assert watch.peak == 30 and sketch.shape == (2, 5)


def test_optimizer_bytes_are_what_the_state_holds():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert count.optimizer_bytes(optimizer, model) == 2 * 4 * (12 + 3) + 4 * 2
    assert count.size([model.weight, model.weight.t(), model.bias]) == 4 * (12 + 3)


def test_arms_take_turns_and_ratios_are_taken_round_by_round():
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = clock.interleaved(steps, rounds=8, seed=0)
    turns = [tuple(calls[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 2
    assert all(len(values) == 8 for values in found.values())
    # the machine was twice as slow in the second round; the ratio does not see it
    ratios = clock.ratios({"a": [1.0, 2.0, 1.0], "b": [0.5, 1.0, 0.5]}, "a")
    assert ratios["b"] == {"median": 0.5, "lower": 0.5, "upper": 0.5, "min": 0.5, "max": 0.5}
    assert clock.ratios({"a": [1.0, 2.0, 1.0], "b": [0.5, 1.0, 0.5]}, "a", paired=False)["b"]["max"] == 1.0


def test_one_round_has_a_spread_of_nothing():
    assert clock.spread([2.0]) == {"median": 2.0, "lower": 2.0, "upper": 2.0, "min": 2.0, "max": 2.0}


def test_full_fine_tuning_trains_everything_and_adamw_takes_what_trains():
    ours = ready("full")
    assert all(p.requires_grad for p in ours.model.parameters())
    ours.model.requires_grad_(False)
    ours.model.get_parameter("lm_head.weight").requires_grad_(True)
    assert len(adamw(ours.model).param_groups[0]["params"]) == 1


def test_growth_is_drawn_with_a_line_per_arm(tmp_path):
    counts = {"flops": 10**12, "peak_bytes": 2**30}
    points = [{"value": v, "arms": {"a": counts, "b": counts}} for v in (1, 2, 4)]
    path = chart.lines({"rank": {"axis": "rank", "doubling": True, "points": points}}, "title", tmp_path / "g.png")
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- the house -------------------------------------------------------------------------------------------------------

FILES = sorted(p for p in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small_and_siblings_do_not_know_each_other(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= 400 and ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
        if isinstance(node, ast.ImportFrom) and path.parent.name in ("arms", "kinds"):
            assert not (node.module or "").startswith(f"benchmarks.{path.parent.name}"), path.name


def test_options_have_defaults_that_a_case_can_leave_out():
    for name in registry.names("benchmarks.arms"):
        module = registry.get("benchmarks.arms", name)
        assert module.Options() is not None and module.__doc__.endswith((".", ". ")), name
    assert Training(SMALL, ROWS, {}, "full").warm_up >= 1
    assert set(SHAPES) >= {"llama-12x384", "llama-2-7b", "llama-3-8b"}
