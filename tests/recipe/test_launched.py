"""A recipe in two processes, started by each config file that ships: what one trains is trained, said once and saved once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.ranks import as_accelerators
from layerpeft.cli import main
from layerpeft.recipe import launching
from layerpeft.recipe.launching import launched
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.shipped import launch_files
from tests.helpers.launching import environment
from tests.helpers.processes import in_a_process
from tests.helpers.short import short_llama

WORDS = [
    "train", "quickstart", "max_steps=2", "warmup_steps=0", "max_train_samples=8", "max_eval_samples=2", "sample_tokens=3",
    "learning_rate=2e-3", "adam_epsilon=1e-6", "train_sampling_strategy=sequential", "gradient_accumulation_steps=1",
    "layerpeft.select={by: gradient_norm, keep: 2, num_batches: 1}", "layerpeft.lora_dropout=0", "save_strategy=steps",
    "save_steps=1", "logging_steps=1", "max_length=128",
]  # fmt: skip
FILES = launch_files()


def short() -> str:
    """The model: in the process that tests, whose folder the others read."""
    return f"model_name_or_path={short_llama()}"


def in_two(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, *words: str, ranks: int = 2
) -> tuple[list[int], str]:
    """The exit codes of both processes (or of so many), and all that they said."""
    for key, value in environment(FILES[f"accelerate/{name}"]).items():
        monkeypatch.setenv(key, value)
    done = in_a_process(str(Path(__file__).resolve()), *words, cwd=place, ranks=ranks)
    assert done.returncode == 0, done.stderr[-8000:]
    return [int((place / f"code{rank}").read_text()) for rank in range(ranks)], done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main([*WORDS, short(), f"output_dir={folder}", "per_device_train_batch_size=4"]) == 0
    return folder


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["fsdp2", *(pytest.param(n, marks=SLOW) for n in ("ddp", "zero2", "zero3"))])
def test_each_config_file_trains_what_one_process_trains(name, alone, tmp_path, monkeypatch):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    words = [*WORDS, short(), "output_dir=out", "per_device_train_batch_size=2"]
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
    if (
        name != "fsdp2"
    ):  # each process has written into the checkpoints, and all of it is on record: it may be written over
        codes, said = in_two(tmp_path, monkeypatch, name, *words, "overwrite_output_dir=true", "max_steps=1")
        assert codes == [0, 0] and not (folder / "checkpoint-2").exists(), said[-8000:]


def test_what_both_processes_refuse_is_said_once_and_ends_both(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    codes, said = in_two(tmp_path, monkeypatch, "fsdp2", *WORDS, "output_dir=out", "layerpeft.selct=2")
    assert codes == [2, 2] and said.count("2 problems") == 1 and said.count("out is not empty") == 1
    codes, said = in_two(tmp_path, monkeypatch, "ddp", "train", "no-such-recipe")
    assert codes == [2, 2] and said.count("no file ") == 1


@SLOW
@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_a_run_goes_on_in_three_processes_where_two_began(name, tmp_path, monkeypatch):
    words = [*WORDS, short(), "max_steps=4", "save_steps=2", "max_train_samples=24", "lr_scheduler_type=constant"]
    assert main([*words, f"output_dir={tmp_path / 'alone'}", "per_device_train_batch_size=6"]) == 0
    codes, said = in_two(
        tmp_path, monkeypatch, name, *words, "max_steps=2", "output_dir=out", "per_device_train_batch_size=3"
    )
    assert codes == [0, 0], said[-8000:]
    again = [*words, "output_dir=out", "resume_from_checkpoint=true", "per_device_train_batch_size=2"]
    codes, said = in_two(tmp_path, monkeypatch, name, *again, ranks=3)
    assert codes == [0, 0, 0], said[-8000:]
    found, wanted = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("out", "alone"))
    assert found.keys() == wanted.keys() and max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < 5e-4


@SLOW
@pytest.mark.parametrize("program", ["accelerate", "torchrun"])
def test_launchers_start_the_command_itself(program, alone, tmp_path):
    """As a user types it; the recipe says that these are CPUs, which Accelerate gives DDP."""
    launch = {
        "accelerate": "-m accelerate.commands.launch --config_file ddp.yaml --num_processes 2 --mixed_precision no",
        "torchrun": "-m torch.distributed.run --nproc_per_node 2",
    }[program]
    assert main(["recipes", "copy", "accelerate/ddp", str(tmp_path)]) == 0
    words = [*WORDS, short(), "output_dir=out", "per_device_train_batch_size=2", "use_cpu=true"]
    command = [sys.executable, *launch.split(), "-m", "layerpeft", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-8000:]
    found, wanted = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", alone))
    assert found.keys() == wanted.keys() and max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < 5e-4
    assert (done.stdout + done.stderr).count("written to out") == 1


@SLOW
def test_embeddings_train_where_each_process_holds_the_model_and_one_saves(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    words = ["train", "embeddings", "output_dir=out", "max_steps=12", "save_strategy=steps", "save_steps=1"]
    codes, said = in_two(tmp_path, monkeypatch, "ddp", *words, "max_eval_samples=8", "per_device_train_batch_size=4")
    assert codes == [0, 0] and said.count("written to out") == 1 and said.count("recall at 1: ") == 1, said[-8000:]
    assert "was not written by layerpeft" not in said  # as it is where another process has, at the same time
    folders = [tmp_path / "out", *(tmp_path / "out").glob("checkpoint-*")]
    assert len(folders) == 13 and all((f / "1_Pooling" / "config.json").is_file() for f in folders)
    codes, said = in_two(tmp_path, monkeypatch, "fsdp2", *words, "output_dir=other")
    assert codes == [2, 2] and said.count("that hold the whole model each (DDP)") == 1


def test_arms_are_compared_in_one_process_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launching, "world_size", lambda: 2)
    assert main(["compare", "quickstart", f"output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "compare runs in one process, and there are 2: start it without accelerate launch" in said
    assert not (tmp_path / "out").exists()


@SLOW
def test_that_is_said_once_by_two(tmp_path, monkeypatch):
    codes, said = in_two(tmp_path, monkeypatch, "ddp", "compare", *WORDS[1:], "output_dir=out")
    assert codes == [2, 2] and said.count("compare runs in one process") == 1, said[-4000:]


def test_one_process_beside_several_accelerators_is_told_the_command_for_all(monkeypatch, tmp_path, capsys):
    from layerpeft.recipe import launching

    recipe = load_recipe("quickstart", [f"output_dir={tmp_path / 'out'}"], "train")
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(launching, "training_arguments", lambda _: type("Arguments", (), {"use_cpu": False}))
    launching.suggest_launch(recipe)
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
