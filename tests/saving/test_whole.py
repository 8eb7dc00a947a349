"""Folders that are written as a whole: an earlier one of layerpeft's gives way, and nothing else ever does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.errors import SaveError
from layerpeft.integrations.files import written_whole
from layerpeft.saving.owned import RECORD, put_on_record
from layerpeft.saving.whole import refusal, writing_whole
from layerpeft.tuners.merge import named_base
from tests.helpers.short import short_llama


def written(target: Path, **files: str) -> Path:
    with writing_whole(target, "merge") as partial:
        for name, text in files.items():
            path = partial / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return target


def held(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != RECORD)
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def test_what_layerpeft_wrote_gives_way_and_what_it_did_not_stays(tmp_path: Path) -> None:
    target = written(tmp_path / "out", config="1", part__old="2")
    assert "--overwrite" in str(refusal(target, False, ()))
    assert refusal(target, True, (None, "me/on-the-hub", tmp_path)) is None
    (target / "mine").mkdir()
    (target / "mine" / "base.gguf").write_text("mine")
    (target / "part" / "notes").symlink_to("/nowhere")
    written(target, config="3")
    assert held(target) == {"config": "3", "mine/base.gguf": "mine"} and (target / "part" / "notes").is_symlink()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (target / "config").write_text("changed")
    assert "changed since it was written: config" in str(refusal(target, True, ()))


def test_names_that_meet_lose_nothing(tmp_path: Path) -> None:
    target = written(tmp_path / "out", config="1")
    (target / "extra").write_text("mine")
    written(target, config="2", extra="new")
    assert held(target) == {"config": "2", "extra": "new"}
    (kept,) = tmp_path.glob(".out.*.old/extra")
    assert kept.read_text() == "mine"


def test_a_file_in_the_place_of_a_folder_loses_nothing(tmp_path: Path) -> None:
    target = written(tmp_path / "out", part__old="1")
    (target / "part" / "notes").write_text("mine")
    written(target, part="new")
    assert held(target) == {"part": "new"}
    (kept,) = tmp_path.glob(".out.*.old/part/notes")
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("base", [5, ["a"], None])
def test_a_base_that_is_no_name_is_none(tmp_path: Path, base: object) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert named_base(tmp_path) is None


def test_a_run_a_strangers_folder_and_what_is_read_are_never_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").write_text("1")
    put_on_record(run, ["adapter"])  # as a training does
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / RECORD).write_text('{"whole": "merge", "files": {}}')
    for folder in (run, tmp_path / "theirs"):
        assert "no earlier merge or export of layerpeft's" in str(refusal(folder, True, ()))
    target = written(tmp_path / "out", inside__config="1")
    for read in (target, target / "inside"):
        assert "which is read" in str(refusal(target, True, (read,)))
    (tmp_path / "file").write_text("")
    assert "is a file" in str(refusal(tmp_path / "file", True, ()))


def test_an_error_leaves_what_was_there_and_no_folder_more(tmp_path: Path) -> None:
    target = written(tmp_path / "out", config="1")
    for place in (target, tmp_path / "a" / "b" / "c"):
        with pytest.raises(KeyError), writing_whole(place, "merge"):
            raise KeyError
    assert held(target) == {"config": "1"} and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(SaveError, match="filled meanwhile"), written_whole(tmp_path / "new") as partial:
        (partial / "config").write_text("2")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").write_text("3")
    assert held(tmp_path / "new") == {"theirs": "3"}


def test_merges_and_exports_are_replaced_by_those_that_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(short_llama(2)),
        LayerLoraConfig(select="last:1", r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    )
    name = "model.layers.1.mlp.up_proj.weight"
    for number, words in enumerate((["export", "a run", "--to", "gguf", "--whole"], ["merge", "a run", "a run-gguf"])):
        for part, tensor in model.named_parameters():
            if "lora_B" in part:
                tensor.data.fill_(1.0 + number)
        model.save_pretrained("a run")
        assert main([*words, "--overwrite"]) == 0 and main(words) == 2
        said = capsys.readouterr().err
        assert "is not empty" in said and "--overwrite" in said
        (Path("a run-gguf") / "model.gguf").write_text("made by the printed command")
    plain, found = (load_file(Path(p, "model.safetensors"))[name] for p in (short_llama(2), "a run-gguf"))
    a = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}").lora_A["default"].weight
    assert (found - plain - 2 * 8 / 2 * a.sum(0)).abs().max() < 0.02  # B is all 2, alpha 8, rank 2, in bfloat16
    assert Path("a run-gguf", "model.gguf").is_file()
    # a run on such a merge as its base
    get_peft_model(AutoModelForCausalLM.from_pretrained("a run-gguf"), LayerLoraConfig(
        select="last:1", r=2, target_modules=["up_proj"], task_type="CAUSAL_LM",
    )).save_pretrained("second")  # fmt: skip
    assert main(["merge", "second", "a run-gguf", "--overwrite"]) == 2
    assert "which is read" in capsys.readouterr().err and Path("a run-gguf", "model.safetensors").is_file()
    assert main(["export", "second", "--to", "merged", "--out", "a run", "--overwrite"]) == 2
    assert "no earlier merge or export" in capsys.readouterr().err and Path("a run", "adapter_config.json").is_file()
