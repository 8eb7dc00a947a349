"""`layerpeft prefill`: what it fills is what a run would have kept, to the bit; what it cannot do is said before weights load."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe import prefill
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import batches_for, held_out_numbers, load_model, make_trainer, tokenized, train, wrap
from layerpeft.recipe.trainer import prepare as prepared
from layerpeft.recipe.upper import upper_part
from layerpeft.training.prefix import ahead, journals, streaming
from layerpeft.training.prefix.ahead import all_ahead
from layerpeft.training.prefix.folders import DATA, Handle
from tests.helpers.kept import states_in
from tests.helpers.killing import child, differing
from tests.helpers.repeating import some
from tests.helpers.short import short_llama

SMALL = [
    "max_train_samples=5",
    "max_eval_samples=3",
    "sample_tokens=0",
    "num_train_epochs=1",
    "max_steps=-1",
    "use_cpu=true",
]
SMALL += ["per_device_train_batch_size=2", "gradient_accumulation_steps=1", "warmup_steps=0", "save_strategy=no"]
BRIEF = ['columns={text: "{answer}"}', "max_length=48"]
# rows of many lengths, a batch for each way in which a run computes them
CASES = {
    "padded": ("quickstart", ["layerpeft.r=2", *BRIEF]),
    "autocast": ("quickstart", ["layerpeft.r=2", *BRIEF, "bf16=true"]),
    "low precision": ("quickstart", ["layerpeft.r=2", *BRIEF, "dtype=bfloat16"]),
    "packed": (
        "quickstart",
        ["layerpeft.r=2", *BRIEF, "packing=true", "eval_packing=true", "attn_implementation=eager"],
    ),
    "nf4": ("frozen_nf4", ["layerpeft.r=2", *BRIEF]),
    "eight bits": ("quickstart", ["layerpeft.r=2", *BRIEF]),
    "pairs": ("dpo", ["layerpeft.r=2", "max_length=64"]),
    "wanted or not": ("kto", ["layerpeft.r=2", "max_length=64"]),
    "classes": ("revision", ["layerpeft.r=2", 'columns={text: "{after}", label: "{coarse}"}', "max_length=48"]),
}


def settings(case: str, folder: Path, *more: str) -> tuple[str, list[str]]:
    name, own = CASES[case]
    where = f"{{where: {folder}, bits: 8}}" if case == "eight bits" else str(folder)
    base = [f"model_name_or_path={short_llama()}", f"output_dir={folder}-out", "layerpeft.select=last:2"]
    return name, [*base, *SMALL, *own, f"layerpeft.prefix_cache={where}", *more]


def trained(name: str, given: list[str]) -> None:
    """As `layerpeft train` does it, without what it writes."""
    setup = tokenized(prepared(load_recipe(name, given)))
    model = load_model(setup, setup.recipe.select)
    batches, setup = batches_for(setup, model, setup.recipe.select)
    trainer = make_trainer(setup, wrap(setup, model, setup.recipe.select, batches))
    held_out_numbers(trainer)
    train(trainer)


def test_the_command_fills_all_rows_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name, given = settings("padded", tmp_path / "states")
    assert main(["prefill", name, *given]) == 0
    ((folder, found),) = all_ahead(tmp_path / "states")
    assert found.cut == 3 and found.holds_of(short_llama()) and found.forms == (-1, -1, -1)
    assert (found.train.rows, found.held_out.rows) == (5, 3) and len(states_in(tmp_path / "states")) == 8
    said = capsys.readouterr().out
    assert "filled: what enters layer 3 of 5, of 5 rows of training and 3 held out" in said
    assert "\n8 of them were computed now" in said and f"layerpeft train {name}" in said and str(folder) in said


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_a_run_to_the_bit(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if case == "nf4":
        pytest.importorskip("bitsandbytes")
    trained(*settings(case, tmp_path / "run"))
    name, given = settings(case, tmp_path / "ahead")
    assert main(["prefill", name, *given]) == 0
    kept = states_in(tmp_path / "run")
    assert len(kept) > 6 and states_in(tmp_path / "ahead") == kept
    ((folder, found),) = all_ahead(tmp_path / "ahead")
    assert found.train.rows + found.held_out.rows == len(kept) and folder.name == next(iter(kept))[0]
    # once more: what was damaged is computed again, and nothing else
    data = next(file for file in folder.glob(f"*{DATA}") if file.stat().st_size)
    data.write_bytes(bytes(10) + data.read_bytes()[10:])
    capsys.readouterr()
    for computed in (1, 0):
        assert main(["prefill", name, *given]) == 0
        assert f"\n{computed} of them were computed now" in capsys.readouterr().out
        assert states_in(tmp_path / "ahead") == kept


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "nf4"])
def test_a_training_on_what_was_filled_is_that_of_the_whole_model(case: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("LAYERPEFT_QUIET", "")
    name, given = settings(case, tmp_path / "ahead", "num_train_epochs=2")
    assert main(["prefill", name, *given]) == 0
    capsys.readouterr()
    assert main(["train", name, *given]) == 0
    assert "nothing below layer 3 is loaded" in capsys.readouterr().err
    whole = [f"layerpeft.prefix_cache={tmp_path}/none", f"output_dir={tmp_path}/whole"]
    whole = whole if case != "eight bits" else [f"layerpeft.prefix_cache={{where: {tmp_path}/none, bits: 8}}", whole[1]]
    assert main(["train", name, *given, *whole]) == 0
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ahead-out", "whole"))
    if case != "eight bits":  # whose first epoch is computed whole
        assert not differing(ours, theirs)
    assert ours.keys() == theirs.keys() and any(bool(t.any()) for n, t in ours.items() if "lora_B" in n)


@pytest.mark.slow
def test_processes_that_fill_one_folder_at_once_come_to_what_one_fills(tmp_path: Path):
    name, given = settings("padded", tmp_path / "one")
    assert main(["prefill", name, *given]) == 0
    name, given = settings("padded", tmp_path / "three")
    pids = [child(lambda: os._exit(main(["prefill", name, *given]))) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert states_in(tmp_path / "three") == states_in(tmp_path / "one")  # each row once, and no entry torn
    (_, one), (_, three) = (*all_ahead(tmp_path / "one"), *all_ahead(tmp_path / "three"))
    assert one == three and not list((tmp_path / "three").glob(".filling*"))


def full(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """There is no more room: for states on their way, for those that are kept (after a few of them), or for the record."""

    class Full(Handle):
        left = [100_000 if what == "kept" else 10]

        def write(self, data: memoryview, offset: int) -> None:
            if len(data) > self.left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left[0] -= len(data)
            super().write(data, offset)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "recorded":
        monkeypatch.setattr(ahead, "replace_file", no_room)
    else:
        monkeypatch.setattr({"on their way": streaming, "kept": journals}[what], "Handle", Full)


@pytest.mark.parametrize("what", some(["kept", "on their way", "recorded"], 2))
def test_a_full_disk_ends_it_with_what_was_filled_and_it_goes_on_from_there(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "states"
    name, given = settings("padded", root)
    with monkeypatch.context() as patch:
        full(patch, what)
        assert main(["prefill", name, *given]) == 2
    said, there = capsys.readouterr(), states_in(root)
    assert "o space left on device" in said.err or "no room is left on the disk" in said.err, said.err
    assert f"{len(there)} rows are filled; go on with\n  layerpeft prefill {name}" in said.err and not said.out
    assert {"kept": 0 < len(there) < 8, "on their way": not there, "recorded": len(there) == 8}[what]
    assert not list(all_ahead(root)) and not list(root.glob(".filling*"))
    assert upper_part(tokenized(prepared(load_recipe(name, given)))) is None  # training does not take it for whole
    assert main(["prefill", name, *given]) == 0
    assert f"\n{8 - len(there)} of them were computed now" in capsys.readouterr().out
    assert states_in(root).items() >= there.items() and len(states_in(root)) == 8
    ((_, found),) = all_ahead(root)
    assert (found.train.rows, found.held_out.rows) == (5, 3)


REFUSED = {
    "layerpeft.prefix_cache=null": "prefix_cache: it is not set; say where on disk states are to lie:\n  layerpeft prefill",
    "layerpeft.prefix_cache=memory": "memory goes with its process; say where .*\n.*layerpeft.prefix_cache=disk",
    "layerpeft.select={by: gradient_norm, keep: 2}": "gradient_norm chooses layers by what it measures; choose first, then "
    "fill:\n  layerpeft score .*\n  layerpeft prefill .*scores.json",
    "layerpeft.select={by: random, keep: 2, reselect_steps: 2}": "the layers that train change while training",
    "layerpeft.select=first:2": "nothing lies below the lowest layer that trains",
    "neftune_noise_alpha=5": "lower_dropout: off in the layerpeft block leaves it out",
    "drop={keep: 4}": "a model is shortened whole",
    "bf16_full_eval=true": "held-out rows are computed in another type",
    "model_init_kwargs={quantization_config: {load_in_4bit: true}}": "quantize_frozen: nf4",
    "layerpeft.distill={layers: 1, teacher: LLAMA}": "distill looks at layers below 3",
}


@pytest.mark.parametrize("asked", some(REFUSED, [next(iter(REFUSED))]))
def test_what_cannot_be_filled_ahead_is_refused_before_weights_load(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prefill, "load_quantized", None)
    name, given = settings("padded", tmp_path / "states", asked.replace("LLAMA", str(short_llama())))
    with pytest.raises(RecipeError, match=f"(?s){REFUSED[asked]}"):
        prefill.planned(load_recipe(name, given, "prefill"))
    assert not (tmp_path / "states").exists()
