"""Folders that hold a user's files, that are damaged, or that were made to harm: nothing of the user is lost, and one message."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import LayerpeftError, SaveError
from layerpeft.integrations.files import digest_of, fingerprint, read_json
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.save import save_model
from layerpeft.recipe import shipped
from layerpeft.recipe.shipped import recipes
from layerpeft.recipe.train import draw_curve
from layerpeft.saving import owned
from layerpeft.saving.manifest import MANIFEST, read_manifest
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import Selection
from layerpeft.tuners.load import adapter_config
from layerpeft.tuners.merge import merge
from tests.conftest import LLAMA
from tests.helpers.short import short_home, short_llama

pytestmark = pytest.mark.usefixtures("shallow")

SMALL = [
    "layerpeft.select=last:1", "layerpeft.target_modules=[q_proj]", "layerpeft.r=2", "max_steps=2", "warmup_steps=0",
    "max_length=160", "max_train_samples=8", "max_eval_samples=1", "sample_tokens=0", "save_strategy=steps", "save_steps=1",
]  # fmt: skip
DEEP = "[" * 100_000


class Evil:
    """Runs when it is unpickled by anything that runs what pickles say."""

    def __reduce__(self) -> Any:
        return open, ("ran", "w")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "_HERE", short_home())
        assert main(["train", "quickstart", *SMALL, f"output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(run, "out"))


def again(*more: str) -> int:
    return main(["train", "quickstart", *SMALL, "output_dir=out", *more])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- a user's files -------------------------------------------------------------------------------------------------


def test_a_run_is_written_over_at_its_first_step_and_never_before(out, capsys, monkeypatch):
    before = content(out)
    shutil.copytree(short_llama(), "base")
    weights = Path("base/model.safetensors").read_bytes()
    Path("base/model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert again("overwrite_output_dir=true", "model_name_or_path=base") == 2
    assert "model_name_or_path: cannot load 'base'" in capsys.readouterr().err and content(out) == before
    assert again("overwrite_output_dir=true", "save_strategy=no", "max_steps=1") == 0
    assert not list(out.glob("checkpoint-*")) and layerpeft.load(out) is not None
    # what that run wrote is known, what the first one wrote and the second did not is gone from the record
    assert owned.strangers(out, os.listdir(out)) == [] and owned.completed(out) == set()


@pytest.mark.parametrize(
    "where", ["checkpoint-1/thesis.txt", "checkpoint-2/README.md", "log.jsonl", "recipe.yaml", "README.md"]
)
def test_what_the_user_put_or_changed_there_is_kept_and_the_run_refused(out, where, capsys):
    (out / where).write_text("mine")
    before = content(out)
    asked = ["overwrite_output_dir=true"] if where.startswith("check") else ["resume_from_checkpoint=true"]
    assert again(*asked) == 2
    said = capsys.readouterr().err
    assert f"did not write, or what was changed since, and would replace or remove: {where}" in said
    assert "output_dir=out-2" in said and content(out) == before


def test_links_are_not_ours_and_a_limit_on_checkpoints_removes_nothing_else(out):
    target = Path("elsewhere.yaml")
    target.write_bytes((out / "recipe.yaml").read_bytes())
    (out / "recipe.yaml").unlink()
    (out / "recipe.yaml").symlink_to(target.absolute())
    (out / "checkpoint-1" / "notes").symlink_to(target.absolute())
    assert owned.strangers(out, ["recipe.yaml", "log.jsonl"]) == ["recipe.yaml"]
    found = owned.files_below(out, "checkpoint-1")
    assert owned.strangers(out, found) == ["checkpoint-1/notes"]
    assert again("resume_from_checkpoint=true", "save_total_limit=1") == 2
    (out / owned.RECORD).write_text("mine")  # a record that somebody wrote vouches for nothing
    assert owned.strangers(out, [owned.RECORD, "log.jsonl"]) == [owned.RECORD, "log.jsonl"]


def test_in_the_folder_of_a_project_nothing_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = dict.fromkeys(
        ["README.md", "log.jsonl", "scores.json", "compare.json", "compare.jsonl", "layers.csv"], "mine"
    )
    mine = {**mine, "recipe.yaml": recipes()["quickstart"].read_text() + "# mine\n"}  # the one that is run
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    for command in ("train", "score", "compare"):
        asked = ["overwrite_output_dir=true"] * (command == "train")
        words = ["layerpeft.select={by: snr, keep: 1}", "output_dir=.", *asked]
        assert main([command, "recipe.yaml", *words]) == 2
        assert "did not write" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == mine
    assert owned.room(tmp_path, ["scores.json"]) == tmp_path / "layerpeft"  # what came to lie there meanwhile
    draw_curve([{"step": 1, "loss": 1.0}], tmp_path / "training_loss.png")


def test_pictures_of_a_saved_adapter_leave_those_of_the_user(out, tmp_path):
    model = layerpeft.load(out)
    for name in ("layers.csv", "layers.png"):
        (tmp_path / name).write_text("mine")
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "layers.csv").read_text() == (tmp_path / "layers.png").read_text() == "mine"
    assert not {"layers.csv", "layers.png"} & set(read_manifest(tmp_path)["files"])
    model.save_pretrained(str(out))  # its own are replaced
    assert set(read_manifest(out)["files"]) >= {"layers.csv", "layers.png"}


def test_merging_takes_the_place_of_nothing_and_follows_no_link_out(out, capsys):
    Path("real").mkdir()
    Path("link").symlink_to(Path("real").absolute())
    Path(".link.partial").mkdir()
    Path(".link.partial/mine").write_text("mine")
    assert main(["merge", "out", "link"]) == 0
    assert Path("link").is_symlink() and Path("real/model.safetensors").is_file()
    assert Path(".link.partial/mine").read_text() == "mine"
    assert sorted(p.name for p in Path().iterdir()) == [".link.partial", "link", "out", "real"]
    Path("secret").write_text("secret")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(Path("secret").absolute())
    Path("nowhere").symlink_to("/nowhere/at/all")
    for target, why in (("new", "is a link to"), ("nowhere", "leads nowhere"), ("real", "is not empty")):
        assert main(["merge", "out", target]) == 2 and why in capsys.readouterr().err
    assert not Path("new").exists()


# ---- damaged folders ------------------------------------------------------------------------------------------------


def head(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def replaced(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "deep manifest": lambda c: (c / MANIFEST).write_text(DEEP),
    "deep state": lambda c: (c / "trainer_state.json").write_text(DEEP),
    "state of another kind": lambda c: (c / "trainer_state.json").write_text('{"global_step": "two"}'),
    "state with more": lambda c: (c / "trainer_state.json").write_text('{"global_step": 2, "more": 1}'),
    "latin-1 state": lambda c: (c / "trainer_state.json").write_bytes(b'{"\xff": 1}'),
    "folder as state": lambda c: replaced(c / "trainer_state.json", Path.mkdir),
    "text offsets": lambda c: (c / "x.safetensors").write_bytes(head(b'{"a":{"data_offsets":[0,"x"]}}')),
    "deep header": lambda c: (c / "x.safetensors").write_bytes(head(DEEP.encode())),
    "dangling link": lambda c: (c / "x.safetensors").symlink_to("/nowhere"),
    "folder as weights": lambda c: (c / "x.safetensors").mkdir(),
    "looping link": lambda c: (c / "x.safetensors").symlink_to("x.safetensors"),
    "pickled optimizer": lambda c: torch.save({"state": Evil()}, c / "optimizer.pt"),
    "optimizer of another kind": lambda c: torch.save([1], c / "optimizer.pt"),
    "plain pickle": lambda c: (c / "scheduler.pt").write_bytes(pickle.dumps({"a": 1})),
    "random state": lambda c: torch.save("x", c / "rng_state.pth"),
    "a state that came later": lambda c: save_file({"x": torch.ones(1)}, c / "layerpeft_optimizer.safetensors"),
}


@pytest.mark.spread(2)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_refused_where_it_is_named(out, damage, capsys):
    DAMAGE[damage](out / "checkpoint-2")
    assert layerpeft.last_checkpoint(out) == str(out / "checkpoint-1")
    assert main(["plan", "quickstart", *SMALL, "output_dir=new", "resume_from_checkpoint=out/checkpoint-2"]) == 2
    assert "resume_from_checkpoint: out/checkpoint-2 is not complete" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_what_a_checkpoint_hides_until_it_is_loaded_ends_in_one_message(out, capsys):
    shutil.rmtree(out / "checkpoint-1")
    torch.save({"state": 1, "param_groups": 2}, out / "checkpoint-2" / "optimizer.pt")
    assert main(["train", "quickstart", *SMALL, "output_dir=out", "max_steps=3", "resume_from_checkpoint=true"]) == 2
    assert "the run in out/checkpoint-2 cannot be gone on with" in capsys.readouterr().err


def vouched(folder: Path, **changes: Any) -> None:
    """Makes the manifest say of the files what they are now, as whoever planted them would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] |= {n: fingerprint(folder / n) for n in manifest["files"] if (folder / n).is_file()}
    manifest |= changes
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))


def said(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))


def as_bin(folder: Path) -> None:
    """The weights as a pickle, where PEFT looks for one."""
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["adapter_model.safetensors"]
    manifest["files"]["adapter_model.bin"] = {}
    (folder / MANIFEST).write_text(json.dumps(manifest))


PLANTED: dict[str, Callable[[Path], Any]] = {
    "pickle as safetensors": lambda f: torch.save({"x": Evil()}, f / "adapter_model.safetensors"),
    "pickle as bin": as_bin,
    "deep config": lambda f: (f / "adapter_config.json").write_text(DEEP),
    "latin-1 config": lambda f: (f / "adapter_config.json").write_bytes(b'{"r": "\xff"}'),
    "config is a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "no such method": lambda f: said(f, peft_type="NOPE"),
    "method is a number": lambda f: said(f, peft_type=5),
    "base is a list": lambda f: said(f, base_model_name_or_path=["x"]),
    "odd class": lambda f: said(
        f, task_type=None, auto_mapping={"parent_library": "transformers.nope", "base_model_class": "X"}
    ),
    "class of another package": lambda f: said(
        f, task_type=None, auto_mapping={"parent_library": "os", "base_model_class": "X"}
    ),
    "class is a number": lambda f: said(f, task_type=None, auto_mapping={"parent_library": 5, "base_model_class": []}),
    "endless pattern": lambda f: said(f, rank_pattern={r"(\w+\.?)+Z": 4}),
    "rank is text": lambda f: said(f, r="many"),
    "targets are a number": lambda f: said(f, target_modules=7),
    "other tensors": lambda f: save_file(
        {k: v[:1] for k, v in load_file(f / "adapter_model.safetensors").items()}, f / "adapter_model.safetensors"
    ),
}
WRONG: dict[str, dict[str, Any]] = {
    "files is a list": {"files": []}, "file is null": {"files": {"adapter_config.json": None}},
    "format is text": {"format": "1"}, "config is null": {"config": None}, "report is a number": {"report": 3},
    "report holds text": {"report": [{"layer": "x", "steps": "y"}]}, "method is a list": {"method": []},
    "selection is text": {"selection": "x"}, "selection is hollow": {"selection": {"layers": [1]}},
    "quant is text": {"quant": "x"}, "new tensors is a number": {"new_tensors": 4},
}  # fmt: skip


@pytest.mark.parametrize("damage", [*PLANTED, *WRONG])
def test_a_planted_adapter_runs_nothing_and_is_one_message(out, damage, capsys):
    if damage in PLANTED:
        PLANTED[damage](out)
    vouched(out, **WRONG.get(damage, {}))
    assert main(["merge", "out", "merged"]) == 2, damage
    text = capsys.readouterr().err
    assert "layerpeft: " in text and "Traceback" not in text
    with pytest.raises(LayerpeftError):
        layerpeft.load(out)
    assert not Path("ran").exists() and not Path("merged").exists() and not list(Path().glob(".merged*"))


S = b'{"format":1,"by":"x","fingerprint":"f","stack":"s","values":'


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"\xff", S + b"null}", S + b"[1" + b"0" * 400 + b"]}", S + b"[1e999]}", S + b"[NaN]}", S + b'["x"]}',
     S + b"[1],\"by\":5}", S + b"[1],\"targets\":[]}", S + b"[1" + b"0" * 5000 + b"]}", DEEP.encode(), S[:20]],
)  # fmt: skip
def test_scores_that_are_none(tmp_path, data):
    (tmp_path / "s.json").write_bytes(data)
    with pytest.raises(LayerpeftError):
        Scores.load(tmp_path / "s.json")
    for kind in (Selection, Quantized):
        with pytest.raises(LayerpeftError):
            kind.from_dict({"layers": [5], "format": 1, "modules": {"a": None}, "rows": 3, "targets": 7})


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "none", "."):
        with pytest.raises(SaveError, match="cannot be read|truncated or altered"):
            read_json(tmp_path / name)
    with pytest.raises(LayerpeftError, match="no scores file"):
        Scores.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": 1},
        {"format": "x"},
        {"modules": []},
        {"packed": {"a": None}},
        {"class": "nope"},
        {"class": "logging"},
    ],
)
def test_a_quantized_folder_of_other_types(tmp_path, changes, llama):
    layerpeft.quantize(llama, {"select": "last:1", "bits": 8}, progress=False)
    path = save_model(llama, tmp_path / "q") / "layerpeft_quant.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest | {"sha256": digest_of(manifest)}))
    with pytest.raises(LayerpeftError):
        layerpeft.load(tmp_path / "q")
    with pytest.raises(LayerpeftError):
        merge(tmp_path / "q", tmp_path / "m")


def test_an_adapter_that_is_cut_short_is_told(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(LLAMA), "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((1000).to_bytes(8, "little") + b'{"a": ')
    for command in (["generate", "--prompt", "a"], ["export", "--to", "vllm"]):
        with pytest.raises(SaveError, match="adapter_model.safetensors is truncated"):
            adapter_config(tmp_path)
        assert main([command[0], str(tmp_path), *command[1:]]) == 2
