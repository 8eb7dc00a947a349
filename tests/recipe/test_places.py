"""Paths of a recipe: from the current folder, then beside it; and a scorer that is a file beside it."""

from pathlib import Path

import pytest

from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe.read import load_recipe
from layerpeft.selection.scores import Scores
from tests.conftest import LLAMA

pytestmark = pytest.mark.usefixtures("shallow")

RECIPE = """\
trainer: sft
model_name_or_path: layerpeft://llama-6m
dataset_name: rows.jsonl
eval_dataset: [data/*.jsonl]
output_dir: out
layerpeft: {select: {by: %s, keep: 2}, r: 2}
max_steps: 1
max_length: 32
per_device_train_batch_size: 1
sample_tokens: 0
save_strategy: "no"
gradient_checkpointing: false
"""
SCORER = """\
from __future__ import annotations

from dataclasses import dataclass

from layerpeft.selection.scoring import Measured


@dataclass(frozen=True)
class Options:
    start: int = 1


def needs(options: Options) -> str:
    return "nothing"


def score(request, options: Options) -> Measured:
    return Measured(tuple(float(i in (options.start, 4)) for i in range(len(request.layers))))
"""
ROW = '{"prompt": "Why?", "completion": " So it is."}\n'


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder of its own, and another folder to run it from."""
    beside = tmp_path / "recipes"
    (beside / "data").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("LAYERPEFT_QUIET", "0")
    monkeypatch.chdir(tmp_path / "here")
    for name in ("rows.jsonl", "data/held_out.jsonl"):
        (beside / name).write_text(ROW * 3)
    (beside / "mine.py").write_text(SCORER)
    (beside / "recipe.yaml").write_text(RECIPE % "./mine.py")
    return beside


def test_paths_lie_in_the_current_folder_or_beside_the_recipe(home: Path) -> None:
    recipe = str(home / "recipe.yaml")
    by_place = ["layerpeft.select=last:2"]
    found = load_recipe(recipe, by_place)
    assert found["dataset_name"] == str(home / "rows.jsonl") and found["eval_dataset"] == [str(home / "data/*.jsonl")]
    Path("rows.jsonl").write_text(ROW)
    assert load_recipe(recipe, by_place)["dataset_name"] == "rows.jsonl"  # the current folder comes first
    Path("rows.jsonl").unlink()
    settings = ["dataset_name=rowz.jsonl", "model_name_or_path=./models/none", "layerpeft.select.by=scores.json"]
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, settings)
    texts = {problem.path[-1]: problem.text for problem in error.value.problems}
    for key, name in (("model_name_or_path", "models/none"), ("dataset_name", "rowz.jsonl"), ("by", "scores.json")):
        assert f"(looked for {Path.cwd() / name} and {home / name})" in texts.pop(key)
    assert texts == {}
    assert load_recipe(recipe, [*by_place, "output_dir=~nobody-here/x"])["output_dir"] == "~nobody-here/x"


def test_saved_scores_lie_beside_the_recipe(home: Path) -> None:
    Scores((0.5,) * 12, "mine", "of another model", "model.layers").save(home / "scores.json")
    (home / "recipe.yaml").write_text(RECIPE % "scores.json")
    with pytest.raises(RecipeError) as error:  # it was found, and read
        load_recipe(str(home / "recipe.yaml"))
    assert "do not belong to this model" in str(error.value) and "no file" not in str(error.value)


def test_an_earlier_run_lies_beside_the_recipe(home: Path) -> None:
    (home / "runs/first").mkdir(parents=True)
    recipe = str(home / "recipe.yaml")
    change = ["layerpeft.select.by=change", "layerpeft.select.of=runs/first"]
    assert load_recipe(recipe, change).select["of"] == str(home / "runs/first")
    Path("runs/first").mkdir(parents=True)
    assert load_recipe(recipe, change).select["of"] == "runs/first"  # the current folder comes first
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, [change[0], "layerpeft.select.of=runs/frist"])
    places = f"(looked for {Path.cwd() / 'runs/frist'} and {home / 'runs/frist'})"
    assert f"of: no folder 'runs/frist' {places}" in str(error.value)
    for settings in ([], ["layerpeft.select.of=3"]):  # before any weight is loaded
        with pytest.raises(RecipeError, match="needs the folder of an earlier run"):
            load_recipe(recipe, [change[0], *settings])


def test_a_score_by_the_order_of_rows_is_refused_before_weights_load(home: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"command line: by: language goes by the order of rows.*write by: scores.json"
    ):
        load_recipe(str(home / "recipe.yaml"), ["layerpeft.select.by=language"])
    with pytest.raises(
        RecipeError, match=r"by: probe needs a class for every row.*trainer: sft.*write by: scores.json"
    ):
        load_recipe(str(home / "recipe.yaml"), ["layerpeft.select.by=probe"])
    with pytest.raises(RecipeError, match=r"by: importance is nothing before adapters have trained; .*reselect_steps"):
        load_recipe(str(home / "recipe.yaml"), ["layerpeft.select.by=importance"])


def test_a_scorer_is_a_file_beside_the_recipe(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(home / "recipe.yaml")
    assert main(["plan", recipe]) == 2
    said = capsys.readouterr().err
    assert f"by: ./mine.py: would run code that is not layerpeft's ({home / 'mine.py'}" in said and "--run-code" in said
    assert main(["train", recipe]) == 0
    said = capsys.readouterr()
    assert "by: ./mine.py: runs code that is not layerpeft's" in said.err
    assert said.err.index("runs code") < said.err.index("loading the model")
    assert "layers 1, 4 (" in said.err or "layers 1, 4" in said.out
    assert Path("out/mine.py").read_text() == SCORER
    assert main(["score", "out/recipe.yaml", "output_dir=again", "layerpeft.select.start=2"]) == 0
    chosen = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" yes")]
    assert chosen == ["2", "4"]
    assert main(["plan", recipe, "--run-code"]) == 0


@pytest.mark.parametrize(
    ("code", "by", "said"),
    [
        ("raise RuntimeError('no')", "./mine.py", "RuntimeError: no"),
        ("def needs(", "./mine.py", "SyntaxError"),
        ("x = 1", "./mine.py", "Options: missing"),
        (SCORER, "../here/mine.py", "code is taken from beside the recipe alone"),
        (SCORER, "./yours.py", "is no file of code"),
    ],
)
def test_what_is_wrong_with_a_scorer(
    code: str, by: str, said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(code)
    (home / "mine.py").write_text(code)
    assert main(["train", str(home / "recipe.yaml"), f"layerpeft.select.by={by}"]) == 2
    text = capsys.readouterr().err
    assert said in text and "Traceback" not in text


MEANT = [
    (["train", "recpe.yaml"], "recipe.yaml"),
    (["compare", "recipe.yaml", "--arms", "./recpe.yaml"], "recipe.yaml"),
    (["plan", "recipe.yaml", "model_name_or_path=models/lama-6m"], "models/llama-6m"),
    (["plan", "recipe.yaml", "dataset_name=data/gogn"], "data/gone"),
    (["plan", "recipe.yaml", "output_dir=new", "resume_from_checkpoint=models/lama-6m"], "models/llama-6m"),
    (["init", "--model", "lamas", "--data", "rows.jsonl", "--out", "new.yaml"], "llama"),
    (["init", "--model", "./lamas", "--data", "rows.jsonl", "--out", "new.yaml"], "llama"),
    (["init", "--model", "layerpeft://llama-6m", "--data", "rowz", "--out", "new.yaml"], "rows.jsonl"),
    (["init", "--model", "layerpeft://llama-6m", "--data", "rows.jsonl", "--out", "modls/new.yaml"], "models"),
    (["import", "recpe.yaml"], "recipe.yaml"),
    (["generate", "lamas", "--prompt", "x"], "llama"),
    (["generate", "./modls/llama-6m", "--prompt", "x"], "models/llama-6m"),
    (["predict", "models/llama-6m", "rowz.jsonl", "--out", "out.csv"], "rows.jsonl"),
    (["predict", "models/llama-6m", "rows.jsonl", "--out", "modls/out.csv"], "models"),
    (["generate", "models/llama-6m", "--prompts", "rowz.jsonl"], "rows.jsonl"),
    (["export", "models/lama-6m", "--to", "merged"], "models/llama-6m"),
    (["report", "models/lama-6m"], "models/llama-6m"),
    (["merge", "models/lama-6m", "new"], "models/llama-6m"),
    (["merge", "models/llama-6m", "new", "--plus", "lamas", "--minus", "lamas"], "llama"),
    (["merge", "models/llama-6m", "new", "--weights", "rowz.jsonl"], "rows.jsonl"),
]


@pytest.mark.parametrize(("words", "found"), MEANT, ids=lambda value: value if isinstance(value, str) else value[0])
def test_what_is_misspelt_is_asked_for(
    home: Path, words: list[str], found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for place in ("models/llama-6m", "llama", "data/gone"):
        Path(place).mkdir(parents=True)
    for file in LLAMA.iterdir():
        (Path("models/llama-6m") / file.name).symlink_to(file)
    Path("recipe.yaml").write_text(RECIPE % "gradient_norm")
    before = sorted(Path().rglob("*"))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"Did you mean {found!r}?" in said and "Traceback" not in said and sorted(Path().rglob("*")) == before


def test_a_folder_without_rows_is_no_address(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("docs").mkdir()
    Path("docs/page.md").write_text("# No rows\n")
    assert main(["plan", str(home / "recipe.yaml"), "layerpeft.select=last:2", "dataset_name=docs"]) == 2
    assert "dataset_name: the folder 'docs' holds no rows: no file in it can be read (.jsonl" in capsys.readouterr().err
