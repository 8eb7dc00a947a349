"""A recipe in two processes, started by each config file that ships: what one trains is trained, said once and saved once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.ranks import as_accelerators
from layerpeft.cli import main
from layerpeft.recipe.advice import launched
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.shipped import launch_files
from tests.helpers.launching import environment
from tests.helpers.processes import in_a_process

WORDS = [
    "train", "quickstart", "max_steps=2", "warmup_steps=0", "max_train_samples=8", "max_eval_samples=2", "sample_tokens=3",
    "learning_rate=2e-3", "adam_epsilon=1e-6", "train_sampling_strategy=sequential", "gradient_accumulation_steps=1",
    "layerpeft.select={by: gradient_norm, keep: 2, num_batches: 1}", "layerpeft.lora_dropout=0", "save_strategy=steps",
    "save_steps=1", "logging_steps=1", "max_length=256",
]  # fmt: skip
FILES = launch_files()


def in_two(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> tuple[list[int], str]:
    """The exit codes of both processes, and all that they said."""
    for key, value in environment(FILES[f"accelerate/{name}"]).items():
        monkeypatch.setenv(key, value)
    done = in_a_process(str(Path(__file__).resolve()), *words, cwd=place, ranks=2)
    assert done.returncode == 0, done.stderr[-8000:]
    return [int((place / f"code{rank}").read_text()) for rank in (0, 1)], done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main([*WORDS, f"output_dir={folder}", "per_device_train_batch_size=4"]) == 0
    return folder


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["fsdp2", *(pytest.param(n, marks=SLOW) for n in ("ddp", "zero2", "zero3"))])
def test_each_config_file_trains_what_one_process_trains(name, alone, tmp_path, monkeypatch):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    words = [*WORDS, "output_dir=out", "per_device_train_batch_size=2"]
    codes, said = in_two(tmp_path, monkeypatch, name, *words)
    assert codes == [0, 0], said[-8000:]
    folder = tmp_path / "out"
    found, wanted = (load_file(f / "adapter_model.safetensors") for f in (folder, alone))
    assert found.keys() == wanted.keys() and max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < 5e-4
    before, *steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = json.loads((alone / "log.jsonl").read_text().splitlines()[0])
    assert before["step"] == 0 and before["eval_loss"] == pytest.approx(first["eval_loss"], rel=0.05)
    assert all(line["step"] for line in steps)
    for once in (
        "held-out loss: ",
        "\nbefore:\n",
        "\nafter:\n",
        "written to out",
        "trainable params",
    ):
        assert said.count(once) == 1, once
    assert {"checkpoint-1", "checkpoint-2", "layerpeft.json", "layers.csv"} <= {p.name for p in folder.iterdir()}
    # each process has written into the checkpoints, and all of it is on record: it may be written over
    codes, said = in_two(tmp_path, monkeypatch, name, *words, "overwrite_output_dir=true", "max_steps=1")
    assert codes == [0, 0], said[-8000:]
    assert not (folder / "checkpoint-2").exists()


def test_what_both_processes_refuse_is_said_once_and_ends_both(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    codes, said = in_two(tmp_path, monkeypatch, "fsdp2", *WORDS, "output_dir=out", "layerpeft.selct=2")
    assert codes == [2, 2] and said.count("2 problems") == 1 and said.count("out is not empty") == 1
    codes, said = in_two(tmp_path, monkeypatch, "ddp", "train", "no-such-recipe")
    assert codes == [2, 2] and said.count("no such file") == 1


def test_one_process_beside_several_accelerators_is_told_the_command_for_all(monkeypatch, tmp_path, capsys):
    from layerpeft.recipe import advice

    recipe = load_recipe("quickstart", [f"output_dir={tmp_path / 'out'}"], "train")
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(advice, "training_arguments", lambda _: type("Arguments", (), {"use_cpu": False}))
    advice.advise(recipe)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[layerpeft] 4 accelerators are here") and line.endswith(launched(recipe, 4))
    assert f"--config_file {FILES['accelerate/ddp']} --num_processes 4 -m layerpeft train quickstart" in line


def test_the_config_files_ship_and_are_copied(tmp_path, capsys):
    assert set(FILES) == {f"accelerate/{name}" for name in ("ddp", "fsdp2", "zero2", "zero3")}
    assert main(["recipes", "copy", "accelerate/zero3", str(tmp_path)]) == 0
    assert (tmp_path / "zero3.yaml").read_bytes() == FILES["accelerate/zero3"].read_bytes()
    assert f"accelerate launch --config_file {tmp_path / 'zero3.yaml'} -m layerpeft train" in capsys.readouterr().out


if __name__ == "__main__":
    if os.environ["ACCELERATE_USE_CPU"] == "false":
        as_accelerators("ACCELERATE_USE_DEEPSPEED" in os.environ)
    code = main(sys.argv[1:])
    Path(f"code{os.environ['RANK']}").write_text(str(code))
