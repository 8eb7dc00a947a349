"""Pictures and sounds, in folders or as rows: what init writes for them is planned, shown and trained as it is."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe import commands
from layerpeft.recipe.init import Wanted, look
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.rows import load
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.trainer import prepare


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toys(name: str, key: str, into: str, table: bool = True, count: int = 24) -> list[dict]:
    """The first rows of a toy with its files in a folder: a table beside them, or in folders by class."""
    source = Path(resolve(f"layerpeft://{name}_train.jsonl"))
    rows = [json.loads(line) for line in source.read_text().splitlines()[:count]]
    folder = Path(into)
    folder.mkdir(parents=True)
    made = []
    for row in rows:
        home = folder if table else folder / row["label"]
        home.mkdir(exist_ok=True)
        shutil.copy(source.parent / row[key], home / Path(row[key]).name)
        made.append({**{k: v for k, v in row.items() if k != key}, "file_name": Path(row[key]).name})
    if table:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


def begun(model: str, data: str, *more: str) -> str:
    """What init writes."""
    words = ["--model", f"layerpeft://{model}", "--data", data, "--fit", "24GB", "--out", "r.yaml"]
    assert main(["init", *words, *more]) == 0
    return Path("r.yaml").read_text()


def test_a_table_beside_pictures_is_read_as_datasets_does() -> None:
    toys("shapes", "image", "set/train")
    found = load("set", config=None, split="train")
    wanted = datasets.load_dataset("set", split="train").cast_column("image", datasets.Image(decode=False))
    assert found is not None and found.columns == ["label", "image"]
    pairs = sorted((Path(row["image"]).name, row["label"]) for _, row in found)
    assert pairs == sorted((Path(row["image"]["path"]).name, row["label"]) for row in wanted)
    with pytest.raises(RecipeError, match="no such split, but train"):
        load("set", config=None, split="test")


def test_sounds_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    toys("tunes", "audio", "set")
    text = begun("toy-whisper", "set")
    said = capsys.readouterr().out
    assert "trainer: speech" in text and "# 24 rows, read as sounds and what is said in them (audio, text)" in text
    assert "2 sounds of 200 frames, with 32 tokens each" in said and "rows of" not in said
    (Path("set") / "metadata.jsonl").open("a").write('{"file_name": "gone.wav", "text": "x"}\n')
    with pytest.raises(RecipeError, match=r"metadata.jsonl, line 25: row 25 names a file that is not there"):
        prepare(load_recipe("r.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "trainer", "plan"),
    [
        ("toy-vit", "set", "image_classification", "8 pictures of 32 × 32 pixels, 16 patches each"),
        ("toy-vit", "layerpeft://shapes_train.jsonl", "image_classification", "8 pictures of 32 × 32 pixels"),
        ("toy-wav2vec2", "layerpeft://tunes_train.jsonl", "speech", "8 sounds of 10 seconds"),
        ("toy-llava", "layerpeft://scenes_train.jsonl", "sft", "8 rows of 1024 tokens, pictures left out"),
    ],
)
def test_what_init_writes_is_planned_shown_and_trained(model, data, trainer, plan, capsys) -> None:
    if data == "set":
        toys("shapes", "image", "set", table=False, count=60)
    text = begun(model, data, "output_dir=out", "save_strategy='no'")
    assert f"trainer: {trainer}\n" in text and ("max_length: null" in text) == (trainer == "sft")
    assert "not read" not in text
    for words in (["plan", "r.yaml"], ["preview", "r.yaml"], ["train", "r.yaml", "max_steps=1"]):
        capsys.readouterr()
        assert main(words) == 0
        if words[0] == "plan":
            assert plan in capsys.readouterr().out


def test_columns_of_other_names_tell_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = toys("tunes", "audio", "set")
    lines = [json.dumps({"file_name": r["file_name"], "transcription": r["text"]}) for r in rows]
    (Path("set") / "metadata.jsonl").write_text("\n".join(lines))
    assert look("set").columns == ["audio", "transcription"]
    text = begun("toy-whisper", "set", 'columns={audio: "{audio}", text: "{transcription}"}')
    assert "trainer: speech" in text
    answers = iter(["", "5%", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    (Path("set") / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = commands.asked(Wanted("layerpeft://toy-whisper", "set"), True)
    assert (asked.task, asked.held_out, asked.out) == ("speech", "5%", "recipe.yaml")
