"""Folders that do not hold what a command is for: it says what it looked for, what is there, and the nearest that goes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import SaveError
from layerpeft.saving.instead import lacking
from layerpeft.saving.manifest import CONFIG

LAST = shlex.quote("it's a run/checkpoint-10")
COMMANDS = {
    "merge": ["merge", "FOLDER", "new"],
    "report": ["report", "FOLDER"],
    "export": ["export", "FOLDER", "--to", "vllm"],
    "generate": ["generate", "FOLDER", "--prompt", "x"],
    "predict": ["predict", "FOLDER", "rows.jsonl", "--out", "a.csv"],
    "eval": ["eval", "FOLDER", "rows.jsonl"],
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, one of a run that ended early, two of models, one of something else."""
    monkeypatch.chdir(tmp_path)
    for folder in (
        "empty",
        "it's a run/runs",
        "it's a run/checkpoint-9",
        "it's a run/checkpoint-10",
        "notes",
        "begun/runs",
    ):
        Path(folder).mkdir(parents=True)
    for number in (9, 10):
        Path("it's a run", f"checkpoint-{number}", CONFIG).write_text("{}")
        Path("it's a run", f"checkpoint-{number}", "adapter_model.safetensors").touch()
    Path("it's a run", "checkpoint-11").mkdir()  # cut off while it was saved
    Path("it's a run", "checkpoint-11", CONFIG).write_text("{}")
    Path("notes", "thesis.txt").write_text("mine")
    for name in ("config.json", "model.safetensors"):
        (Path("whole") / name).parent.mkdir(exist_ok=True)
        (Path("whole") / name).write_text("{}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_is_there_and_what_goes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    def said(folder: str) -> str:
        assert main([word.replace("FOLDER", folder) for word in COMMANDS[command]]) == 2
        return capsys.readouterr().err

    assert "holds no adapter" in (text := said("empty")) and f"looked for {CONFIG}" in text and "it is empty" in text
    text = said("it's a run")
    assert "has not saved its adapter" in text
    assert f"name {LAST}, the last of 2 checkpoints" in text
    assert "a run began there" in said("begun") and "name " not in said("begun").split("):")[1]
    assert "there is thesis.txt" in said("notes")
    assert "is a file; name the folder that it lies in: " in said(f"it's a run/checkpoint-9/{CONFIG}")
    if command in ("merge", "report"):
        assert "it is a whole model (config.json, model.safetensors)" in said("whole")


def test_a_folder_called_by_a_number_is_no_checkpoint() -> None:
    Path("years", "2024").mkdir(parents=True)
    for name in (CONFIG, "adapter_model.safetensors"):
        Path("years", "2024", name).touch()
    assert lacking(Path("years"), CONFIG).endswith("; name years/2024")


def test_what_is_near_is_named_from_wherever_one_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("it's a run")
    assert "name checkpoint-10, the last" in lacking(Path(), CONFIG)
    Path("checkpoint-9", "merged").mkdir()
    assert "name the folder above: checkpoint-9" in lacking(Path("checkpoint-9/merged"), CONFIG)
    monkeypatch.chdir("checkpoint-9/merged")
    assert lacking(Path(), CONFIG).endswith("checkpoint-9'")
    Path(f"../{CONFIG}").unlink()
    assert "adapter_model.safetensors lies there without it" in lacking(Path(".."), CONFIG)
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, CONFIG).touch()
        Path(name, "adapter_model.bin").touch()
    assert lacking(Path(), CONFIG).endswith("there is one, two; name one of one, two")
    with pytest.raises(SaveError, match="it is a whole model"):
        layerpeft.load("../../../whole")
