"""What a run says while it works and when it ends: which layers, how to go on, and commands that run as they are printed."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import TrainerCallback, trainer

from layerpeft import text
from layerpeft.cli import main
from layerpeft.recipe import score as scoring
from layerpeft.recipe import train as training
from layerpeft.recipe import trainer as trainer_module

pytestmark = pytest.mark.usefixtures("shallow")

RECIPE = """\
trainer: sft
model_name_or_path: layerpeft://llama-6m
dataset_name: rows.jsonl
eval_dataset: rows.jsonl
columns: {prompt: "{question}", completion: " {answer}"}
output_dir: my run
layerpeft: {select: {by: gradient_norm, keep: 2, num_batches: 1}, r: 2}
max_steps: 3
per_device_train_batch_size: 1
max_length: 32
sample_tokens: 2
logging_steps: 1
save_strategy: "no"
gradient_checkpointing: false
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERPEFT_QUIET", "0")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    Path("rows.jsonl").write_text('{"question": "Why?", "answer": "So that it is."}\n' * 6)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def commands(said: str) -> list[list[str]]:
    """The commands that are printed under "next:", as a shell reads them."""
    lines = said[said.index("next:") :].splitlines()[1:]
    lexers = [
        shlex.shlex(line, posix=True, punctuation_chars=True)
        for line in lines
        if line.startswith(("  layerpeft ", "  python "))
    ]
    for lexer in lexers:
        lexer.whitespace_split = True
    return [list(lexer) for lexer in lexers]


def runs(words: list[str]) -> None:
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
    else:
        assert words[0] == "layerpeft" and len({w.partition("=")[0] for w in words}) == len(words), words
        assert main(words[1:]) == 0, words


def test_what_is_said_and_every_command_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAMPLES", 0)
    assert main(["train", "recipe.yaml"]) == 0
    said = capsys.readouterr()
    order = [
        "reading the rows of rows.jsonl",
        "loading the model layerpeft://llama-6m",
        "scoring layers by gradient_norm",
    ]
    order += ["trains layers ", "measuring held-out rows before", "measuring held-out rows after"]
    places = [said.err.index(part) for part in order]
    assert places == sorted(places)
    record = json.loads(Path("my run/layerpeft.json").read_text())
    assert f"trains layers {', '.join(map(str, record['selection']['layers']))} (" in said.err
    found = commands(said.out)
    assert [words[1] for words in found] == ["generate", "predict", "eval", "-c", "merge", "export", "compare", "score"]
    for words in found[2:6]:  # those before are in test_after.py
        runs(words)
    capsys.readouterr()
    runs(found[7])
    next_of_score = commands(capsys.readouterr().out)
    assert [words[1] for words in next_of_score] == ["train", "compare"]
    runs(next_of_score[0])
    head = Path("my run/recipe.yaml").read_text().splitlines()[0]
    assert shlex.split(head.removeprefix("# ")) == [
        "layerpeft",
        "train",
        "my run/recipe.yaml",
        "output_dir=my run-again",
    ]
    capsys.readouterr()
    assert main(["score", "recipe.yaml", "output_dir=two;touch words", "layerpeft.select.keep=1"]) == 0
    for words in commands(capsys.readouterr().out):
        assert len({w.partition("=")[0] for w in words}) == len(words) and "two;touch words" in " ".join(words)
        assert not {";", "touch", "words"} & {*words}


@pytest.mark.slow
def test_the_comparison_that_is_printed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "sample_tokens=0", "max_steps=2"]) == 0
    runs(next(words for words in commands(capsys.readouterr().out) if words[1] == "compare"))
    assert Path("my run/compare.json").is_file()


class Stops(TrainerCallback):
    """Ctrl-C after so many steps."""

    after = 2

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Stops])
    plain = ["train", "recipe.yaml", "layerpeft.select=last:1", "sample_tokens=0"]
    assert main(plain) == 130
    assert "layerpeft: interrupted: nothing was saved (save_steps" in capsys.readouterr().err
    saving = [*plain, "save_strategy=steps", "save_steps=1", "overwrite_output_dir=true"]
    assert main(saving) == 130
    said = capsys.readouterr().err
    assert "interrupted: checkpoint-1 is the last that was saved" in said and "Traceback" not in said
    words = next(shlex.split(line) for line in said.splitlines() if line.startswith("  layerpeft train "))
    assert words[1:3] == ["train", "recipe.yaml"] and words[-2:] == [
        "resume_from_checkpoint=true",
        "overwrite_output_dir=false",
    ]
    monkeypatch.setattr(Stops, "after", 99)
    runs(words)
    log = [json.loads(line) for line in Path("my run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3]


def test_curves_of_trackers_lie_in_the_output_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes for TensorBoard: its package is an extra, so a stand-in writes here."""

    class SummaryWriter:
        def __init__(self, log_dir: str | None = None) -> None:
            self.folder = Path(log_dir or "runs")
            self.folder.mkdir(parents=True, exist_ok=True)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            with (self.folder / "events").open("a") as file:
                file.write(f"{name}\n")

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    stand_in = ModuleType("tensorboard")
    stand_in.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", stand_in)
    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", SummaryWriter, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert main(["train", "recipe.yaml", "layerpeft.select=last:1", "report_to=tensorboard", "sample_tokens=0"]) == 0
    assert not Path("runs").exists() and "TENSORBOARD_LOGGING_DIR" not in os.environ
    names = set(Path("my run/runs/events").read_text().split())
    assert {"train/loss", "eval/loss"} <= names


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("tensorbord", "Did you mean 'tensorboard'?"),
        ("[wandb, neptune]", "'neptune' is not there (pip install neptune)"),
    ],
)
def test_trackers_are_known_before_anything_loads(tracker: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", f"report_to={tracker}"]) == 2
    assert said in capsys.readouterr().err


def test_a_rank_that_was_left_behind(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert text.is_first() and text.left_behind() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert text.is_first() and text.left_behind() is None
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "two")):
        monkeypatch.setenv(name, value)
        assert main(["train", "recipe.yaml"]) == 2
        said = capsys.readouterr().err
        assert f"{name}={value}" in said and "`unset RANK " in said
    assert not Path("my run").exists()
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    assert text.left_behind() is None and not text.is_first()


def test_a_stale_rank_trains_and_writes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "recipe.yaml", "layerpeft.select=last:1", "sample_tokens=0", "max_steps=2"]) == 0
    assert "held-out loss" in capsys.readouterr().out and Path("my run/adapter_model.safetensors").is_file()


def test_full_weights_that_round_to_nothing_are_told_their_own_cure(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["layerpeft={method: full, select: last:1}", "dtype=bfloat16", "learning_rate=1e-4", "sample_tokens=0"]
    assert main(["train", "recipe.yaml", *small]) == 2
    said = capsys.readouterr().err
    assert "master_weights: true" in said and "autocast_adapter_dtype" not in said
    small[0] = "layerpeft={method: full, select: last:1, master_weights: true}"
    assert main(["train", "recipe.yaml", *small, "overwrite_output_dir=true"]) == 0


def test_what_other_libraries_print_is_shown_on_request(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("classes.jsonl").write_text('{"text": "yes", "label": "a"}\n{"text": "no", "label": "b"}\n' * 2)
    lines = [
        line
        for line in RECIPE.splitlines()
        if line.partition(":")[0] not in ("columns", "eval_dataset", "sample_tokens")
    ]
    text = "\n".join(lines).replace("sft", "classification").replace("rows.jsonl", "classes.jsonl")
    Path("classes.yaml").write_text(text)
    loading, said = trainer_module.load_model, "this library misses kernels"

    def loud(*args: Any, **kwargs: Any) -> Any:
        logging.getLogger("bitsandbytes.somewhere").warning(said)
        warnings.warn(said, stacklevel=1)
        return loading(*args, **kwargs)

    library, heard = logging.getLogger("bitsandbytes.somewhere"), logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(library, "handlers", [heard])
    library.setLevel(logging.WARNING)
    monkeypatch.setattr(library, "disabled", False)  # whatever was set up before
    logging.disable(logging.NOTSET)
    monkeypatch.setattr(scoring, "load_model", loud)
    assert main(["score", "classes.yaml"]) == 0
    quiet = capfd.readouterr().err
    assert said not in quiet and "MISSING" not in quiet and "deprecated" not in quiet
    assert main(["score", "classes.yaml", "-v"]) == 0
    assert said in capfd.readouterr().err and logging.root.manager.disable == 0
