"""README.md, CONTRIBUTING.md and docs/ name places that are there and all that can be said; the scorer of docs/ works."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

import layerpeft
from layerpeft import cli
from tests.helpers.processes import in_a_process

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
NAMED = re.compile(r"(?<![\w/:.-])(?:layerpeft|tests|benchmarks|docs|recipes)/[\w.<>*/-]*[\w>*/]")
LINKED = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYERS = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
EXAMPLE = (ROOT / "docs" / "adding-a-scorer.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_is_named_is_there(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"https?://\S+|layerpeft://\S+", "", text)
    lost = {path for path in NAMED.findall(prose) if not list(ROOT.glob(re.sub(r"<\w+>", "*", path.rstrip("/"))))}
    lost |= {path for path in LINKED.findall(text) if not (page.parent / path).exists()}
    assert not lost


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) < 150 and max(map(len, lines)) <= 120


PROSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PROSE += [page for folder in ("docs", "benchmarks", "recipes") for page in sorted(ROOT.glob(f"{folder}/**/*.md"))]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_no_longer_than_120_characters(page: Path) -> None:
    """Rows of tables, code and pictures are as long as they are."""
    parts = page.read_text(encoding="utf-8").split("```")[::2]
    long = [
        line
        for part in parts
        for line in part.splitlines()
        if len(line) > 120 and not line.lstrip().startswith(("|", "!["))
    ]
    assert not long


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_every_command_stands_in_the_tables(page):
    named = set(re.findall(r"`(?:layerpeft|…) (\w+)", (ROOT / page).read_text(encoding="utf-8")))
    assert set(cli._parser()[1]) <= named


def first_cells(text: str) -> set[str]:
    """The code words in the first column of all tables of a text."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {word for cell in rows for word in re.findall(r"`(\w+)`", cell)}


def test_the_page_on_layers_names_every_field_and_every_scorer():
    fields = {field.name for field in dataclasses.fields(layerpeft.Select)} - {"options"}
    assert fields <= first_cells(LAYERS), fields - first_cells(LAYERS)
    shipped = {path.stem for path in (ROOT / "layerpeft/selection/scorers").glob("*.py") if path.stem[0] != "_"}
    assert shipped <= set(re.findall(r"`(\w+)`", LAYERS)), shipped - set(re.findall(r"`(\w+)`", LAYERS))


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", EXAMPLE, re.S)
    return found


SCORES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from transformers import LlamaConfig, LlamaForCausalLM
from layerpeft import LayerLoraConfig, get_peft_model, layer_report, score_layers
from layerpeft.errors import LayerpeftError
torch.manual_seed(0)
shape = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(**shape))
with torch.no_grad():
    for index in (1, 3):
        model.model.layers[index].mlp.up_proj.weight.mul_(9)
scores = score_layers(model, by="spread", target_modules="all-linear", power=2.0)
assert scores.by == "spread" and sorted(scores.ranked()[:2]) == [1, 3] and scores.options == {"power": 2.0}, scores
assert len(scores.targets) == 28
try:
    score_layers(model, by="spread", powr=2.0)
except LayerpeftError as error:
    assert "'power'" in str(error), error
else:
    raise AssertionError("a misspelt option")
wrapped = get_peft_model(model, LayerLoraConfig(select={"by": "spread", "keep": 2}, target_modules=["up_proj"], r=2))
rows = layer_report(wrapped).rows
assert [row.layer for row in rows if row.chosen] == [1, 3] and layer_report(wrapped).by == "spread"
print("scored")
"""


def test_the_scorer_of_another_package_scores(tmp_path):
    project = tomllib.loads(block("toml"))["project"]
    ((group, points),) = project["entry-points"].items()
    about = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {module}" for name, module in points.items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    ((_, module),) = points.items()
    (tmp_path / f"{module}.py").write_text(block("python"), encoding="utf-8")
    done = in_a_process(SCORES, tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and "scored" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", [layerpeft.Request, layerpeft.Measured])
def test_the_example_says_what_its_two_classes_hold(kind):
    table = EXAMPLE.partition(f"| `{kind.__name__}` | holds |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == {field.name for field in dataclasses.fields(kind)}


def test_the_cells_of_the_notebook_are_python_and_hold_no_output():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    for cell in cells:
        compile(cell["source"], str(NOTEBOOK), "exec")


@pytest.mark.slow
def test_the_notebook_trains_three_layers_which_plain_peft_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], str(NOTEBOOK), "exec"), space)
    rows = space["layer_report"](space["model"]).rows
    assert sorted(row.layer for row in rows if row.chosen) == sorted(space["scores"].ranked()[:3])
    assert all((row.change > 0) == row.chosen for row in rows if row.change is not None)
    assert space["same"] and float(space["loss"]) < 3.8 and "the same answers: True" in capsys.readouterr().out


def test_the_version_is_the_same_everywhere_and_has_its_section():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert layerpeft.__version__ == version
    assert re.search(rf"^## \[Unreleased\]\n(.*\n)*?## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.M)
