"""The side file, what it refuses, and loading with and without this package."""

import json
import logging
import os
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from layerpeft.errors import SaveError
from layerpeft.model.layers import layer_map
from layerpeft.saving import checkpoints
from layerpeft.saving.manifest import has_weights, read_manifest, selection_of, write_manifest
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import Selection
from layerpeft.training import pictures, report
from layerpeft.training.record import Record
from layerpeft.tuners.load import load_verified
from tests.helpers.processes import in_a_process, without_the_package

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **small)).save_pretrained(folder)
    return folder


def base_model(base_dir):
    return AutoModelForCausalLM.from_pretrained(base_dir)


def selection_for(model, layers=(0, 2)):
    found = layer_map(model)
    targets = tuple(t.name for t in found.targets if t.layer in layers and t.name.endswith("q_proj"))
    scores = Scores((0.1 + 0.2, 1e-7, 2.0), "gradient_norm", found.fingerprint, found.stack, options={"exact": True})
    names = tuple(layer.name for layer in found.layers)
    return Selection(layers, targets, 3, names, found.stack, found.fingerprint, "the 2 largest", scores, {"keep": 2})


def wrapped(base_dir, adapter_name="default"):
    """A trained-looking adapter on two of three layers, with its record hung on by hand."""
    model = base_model(base_dir)
    selection = selection_for(model)
    config = peft.LoraConfig(r=2, target_modules=list(selection.targets), task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config, adapter_name=adapter_name)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    live = model.peft_config[adapter_name]
    live._layerpeft = Record({"r": 2}, "lora", selection, {0: 5, 2: 5}, new_tensors=("score.weight",))
    return model.eval()


def manifest_of(model, adapter_name="default"):
    record = model.peft_config[adapter_name]._layerpeft
    rows = [vars(row) for row in report.rows(model, adapter_name)]
    plain = {"method": record.method, "selection": record.selection.to_dict(), "config": record.config, "report": rows}
    return plain | {"new_tensors": record.new_tensors, "mood": "extra keys are kept"}


def write(model, folder, adapter_name="default"):
    """What a save does, in its order: weights, config, table and picture, manifest."""
    model.save_pretrained(folder)
    if adapter_name != "default":
        folder = folder / adapter_name
    rows = report.rows(model, adapter_name)
    pictures.write_csv(rows, folder / "layers.csv")
    pictures.write_png(rows, folder / "layers.png", "test")
    write_manifest(folder, manifest_of(model, adapter_name))


@pytest.fixture
def folder(base_dir, tmp_path):
    write(wrapped(base_dir), tmp_path / "adapter")
    return tmp_path / "adapter"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refused(folder):
    """The message of the refusal, which load() gives as well, before it touches any model."""
    with pytest.raises(SaveError) as caught:
        read_manifest(folder)
    with pytest.raises(SaveError):
        load_verified(folder, object())  # type: ignore[arg-type]
    return str(caught.value)


def test_manifest_holds_the_choice_and_lists_the_adapters_own_files(folder, base_dir):
    assert selection_of(folder) == selection_for(base_model(base_dir))
    (folder / "optimizer.pt").write_bytes(b"x")
    manifest = read_manifest(folder)
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors", "layers.csv", "layers.png"}
    assert manifest["format"] == 1 and manifest["method"] == "lora" and manifest["mood"] == "extra keys are kept"
    assert manifest["versions"]["peft"] == peft.__version__ and manifest["versions"]["torch"] == torch.__version__
    assert [row["chosen"] for row in manifest["report"]] == [True, False, True]
    assert manifest["files"]["layers.csv"]["size"] == (folder / "layers.csv").stat().st_size
    assert (folder / "layerpeft.json").stat().st_mtime_ns > (folder / "layers.png").stat().st_mtime_ns


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "layers.png", "layerpeft.json"])
def test_one_flipped_bit_anywhere_is_refused(folder, name):
    size = (folder / name).stat().st_size
    for position in (0, size // 3, size // 2, size - 2):
        flip(folder / name, position)
        assert name in refused(folder)
        flip(folder / name, position)
    assert read_manifest(folder)["format"] == 1


def test_every_problem_is_named_at_once(folder):
    cut(folder / "adapter_model.safetensors")
    (folder / "layers.csv").unlink()
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")
    message = refused(folder)
    for problem in ("adapter_model.safetensors is truncated", "layers.csv is missing", "adapter_config.json was alter"):
        assert problem in message


@pytest.mark.parametrize("keep", [0, 1, 50, 1000, -3])
def test_truncated_manifest_is_refused(folder, keep):
    (folder / "layerpeft.json").write_bytes((folder / "layerpeft.json").read_bytes()[:keep])
    assert "layerpeft.json is truncated or altered" in refused(folder)


EDITS = {
    "another choice": (lambda m: m["selection"].update(layers=[1]), "layerpeft.json was altered"),
    "file elsewhere": (lambda m: m["files"].update({"../x": {"size": 0}}), "'../x', which is not a file of this"),
    "nothing to check": (lambda m: m["files"].clear(), "does not list adapter_config.json and the weights"),
    "no size": (lambda m: m["files"]["layers.csv"].pop("size"), "does not say the size of layers.csv"),
    "newer format": (lambda m: m.update(format=2), "format 2 and this version of layerpeft reads up to 1"),
    "no format": (lambda m: m.pop("format"), "does not say its format"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(folder, edit):
    change, message = EDITS[edit]
    manifest = json.loads((folder / "layerpeft.json").read_text())
    change(manifest)
    (folder / "layerpeft.json").write_text(json.dumps(manifest))
    assert message in refused(folder)


def test_weights_that_were_slipped_in_are_refused(folder):
    torch.save({}, folder / "adapter_model.bin")
    assert "adapter_model.bin is there but layerpeft.json does not list it" in refused(folder)


def test_missing_manifest_says_how_to_load_anyway(folder):
    (folder / "layerpeft.json").unlink()
    message = refused(folder)
    assert (
        "has no layerpeft.json" in message and "select: all" in message and "peft.PeftModel.from_pretrained" in message
    )
    assert "is not a folder" in refused(folder / "nothing")


def test_incomplete_adapter_gets_no_manifest(folder):
    before = (folder / "layerpeft.json").read_bytes()
    record = json.loads(before)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SaveError) as caught:
        write_manifest(folder, record)
    message = str(caught.value)
    assert "the weights are missing" in message and "may not hold 'files'" in message
    with pytest.raises(SaveError, match="lacks 'method'"):
        write_manifest(folder, {})
    assert (folder / "layerpeft.json").read_bytes() == before


@pytest.mark.parametrize("value", [object(), float("nan"), torch.ones(1)])
def test_what_is_not_plain_data_leaves_the_old_manifest(folder, base_dir, value):
    before = (folder / "layerpeft.json").read_bytes()
    record = manifest_of(wrapped(base_dir)) | {"extra": [{"deep": value}]}
    with pytest.raises(SaveError, match="cannot write"):
        write_manifest(folder, record)
    assert (folder / "layerpeft.json").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_sets_paths_and_enums_of_a_config_are_written_as_plain_data(folder, base_dir):
    config = {"target_modules": {"v", "q"}, "peft_type": peft.PeftType.LORA, "path": Path("a") / "b"}
    write_manifest(folder, manifest_of(wrapped(base_dir)) | {"config": config})
    written = {"target_modules": ["q", "v"], "peft_type": "LORA", "path": os.path.join("a", "b")}
    assert read_manifest(folder)["config"] == written


def test_saving_again_replaces_everything(folder, base_dir):
    model = wrapped(base_dir)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).mul_(2)
    first = read_manifest(folder)["files"]["adapter_model.safetensors"]
    write(model, folder)
    second = read_manifest(folder)["files"]["adapter_model.safetensors"]
    assert first["size"] == second["size"] and first["sha256"] != second["sha256"]


def test_has_weights_tells_this_saves_weights_from_the_last_ones(base_dir, tmp_path):
    assert not has_weights(tmp_path)
    (model := wrapped(base_dir)).save_pretrained(tmp_path)
    assert has_weights(tmp_path)
    write_manifest(tmp_path, manifest_of(model))
    assert not has_weights(tmp_path)  # transformers' order: the config comes before the weights of this save
    model.save_pretrained(tmp_path)
    assert has_weights(tmp_path)


CRASH = """
import os, sys
from layerpeft.saving import manifest
os.replace = lambda *a: os._exit(9)  # killed after the temporary file, before it takes its place
manifest.write_manifest(sys.argv[1], {"method": "lora", "selection": None, "config": {}, "report": []})
"""


def crash(folder):
    assert in_a_process(CRASH, folder).returncode == 9


def test_killed_between_weights_and_manifest(base_dir, tmp_path):
    (model := wrapped(base_dir)).save_pretrained(tmp_path)
    crash(tmp_path)
    assert len(list(tmp_path.glob(".layerpeft.json.*.tmp"))) == 1
    assert "has no layerpeft.json" in refused(tmp_path)
    write_manifest(tmp_path, manifest_of(model))
    assert read_manifest(tmp_path)["method"] == "lora"
    assert not list(tmp_path.glob(".*"))


def checkpoint(root, step, model, manifest=True):
    folder = root / f"checkpoint-{step}"
    write(model, folder) if manifest else model.save_pretrained(folder)
    torch.save({"state": torch.arange(2000.0)}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save({"cpu": torch.random.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.fixture
def run_dir(base_dir, tmp_path):
    for step in (9, 100):
        checkpoint(tmp_path, step, wrapped(base_dir))
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    return tmp_path


def test_last_checkpoint_counts_in_numbers(run_dir):
    assert checkpoints.last_checkpoint(run_dir) == str(run_dir / "checkpoint-100")
    assert (
        checkpoints.last_checkpoint(run_dir / "checkpoint-100") is None
        and checkpoints.last_checkpoint(run_dir / "no") is None
    )


DAMAGE = {
    "layerpeft.json is gone": (lambda c: (c / "layerpeft.json").unlink(), "has no layerpeft.json"),
    "weights cut": (lambda c: cut(c / "adapter_model.safetensors"), "adapter_model.safetensors is truncated"),
    "weights gone": (lambda c: (c / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "weights flipped": (lambda c: flip(c / "adapter_model.safetensors", -5), "safetensors was altered"),
    "state cut": (lambda c: cut(c / "trainer_state.json"), "trainer_state.json cannot be read"),
    "state gone": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "optimizer cut": (lambda c: cut(c / "optimizer.pt"), "optimizer.pt cannot be read"),
    "optimizer flipped": (lambda c: flip(c / "optimizer.pt", 4000), "optimizer.pt cannot be read"),
    "optimizer gone": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "scheduler gone": (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "random state empty": (lambda c: (c / "rng_state.pth").write_bytes(b""), "rng_state.pth cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_last_checkpoint_passes_over_an_incomplete_one_and_says_why(run_dir, damage, caplog):
    hurt, message = DAMAGE[damage]
    hurt(run_dir / "checkpoint-100")
    with caplog.at_level(logging.WARNING, logger="layerpeft.saving.checkpoints"):
        assert checkpoints.last_checkpoint(run_dir) == str(run_dir / "checkpoint-9")
    assert "checkpoint-100 is passed over" in caplog.text and message in caplog.text


def test_last_checkpoint_after_a_kill_while_saving(base_dir, tmp_path):
    checkpoint(tmp_path, 1, wrapped(base_dir), manifest=False)
    crash(tmp_path / "checkpoint-1")
    assert checkpoints.last_checkpoint(tmp_path) is None


def test_plain_lora_checkpoints_are_resumed_without_a_manifest(base_dir, tmp_path):
    model = wrapped(base_dir)
    first = checkpoint(tmp_path, 1, model, manifest=False)
    second = checkpoint(tmp_path, 2, model, manifest=False)
    assert checkpoints.last_checkpoint(tmp_path) == str(second)
    cut(second / "adapter_model.safetensors")
    assert checkpoints.last_checkpoint(tmp_path) == str(first)
    (first / "adapter_config.json").unlink()
    assert checkpoints.last_checkpoint(tmp_path) is None


def test_a_named_adapters_folder_is_checked_too(base_dir, tmp_path):
    checkpoint(tmp_path, 1, wrapped(base_dir))
    folder = checkpoint(tmp_path, 2, wrapped(base_dir, "poet"), manifest=False)
    assert checkpoints.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    write_manifest(folder / "poet", manifest_of(wrapped(base_dir, "poet"), "poet"))
    assert checkpoints.last_checkpoint(tmp_path) == str(folder)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_load_builds_the_base_and_brings_the_record_back(folder, base_dir):
    model = wrapped(base_dir)
    loaded = load_verified(folder)
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert report.layer_report(loaded) == report.layer_report(model)
    assert loaded.peft_config["default"]._layerpeft == model.peft_config["default"]._layerpeft


def test_load_onto_a_model_for_training(folder, base_dir):
    loaded = load_verified(folder, base_model(base_dir), is_trainable=True, adapter_name="mine")
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 and all(".mine." in name for name in trained)
    assert loaded.peft_config["mine"]._layerpeft.selection == selection_of(folder)
    assert torch.equal(logits(loaded.eval()), logits(wrapped(base_dir)))


def test_load_a_named_adapter_from_its_folder(base_dir, tmp_path):
    model = wrapped(base_dir, "poet")
    write(model, tmp_path, "poet")
    assert torch.equal(logits(load_verified(tmp_path / "poet").eval()), logits(model))
    with pytest.raises(SaveError, match="holds no adapter .*; name .*poet$"):
        load_verified(tmp_path)


def test_load_without_task_type_uses_the_recorded_class(base_dir, tmp_path):
    model = wrapped(base_dir)
    model.peft_config["default"].task_type = None
    write(model, tmp_path)
    loaded = load_verified(tmp_path)
    assert isinstance(loaded.get_base_model(), LlamaForCausalLM)
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("name, message", [(None, "does not name a base model"), ("/no/such/model", "/no/such/model")])
def test_a_base_that_is_not_to_be_had_says_to_pass_one(base_dir, tmp_path, name, message):
    model = wrapped(base_dir)
    model.peft_config["default"].base_model_name_or_path = name
    model.base_model.model.__dict__["name_or_path"] = None
    write(model, tmp_path)
    with pytest.raises(SaveError, match=message) as caught:
        load_verified(tmp_path)
    assert "pass the base model" in str(caught.value)
    assert torch.equal(logits(load_verified(tmp_path, base_model(base_dir)).eval()), logits(model))


def test_load_refuses_a_model_that_lacks_chosen_targets(folder, base_dir):
    shallow = LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(base_dir, num_hidden_layers=2).config)
    with pytest.raises(SaveError, match="lacks 1 of its 2 targets, such as 'model.layers.2.self_attn.q_proj'"):
        load_verified(folder, shallow)
    with pytest.raises(SaveError, match="not a PeftModel"):
        load_verified(folder, wrapped(base_dir))


PLAIN = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerpeft":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import peft, transformers
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
model = peft.PeftModel.from_pretrained(base, sys.argv[1]).eval()
torch.save(model(input_ids=torch.arange(12).reshape(2, 6)).logits.detach(), sys.argv[3])
try:
    import layerpeft
except ModuleNotFoundError:
    print("absent")
"""


def test_plain_peft_loads_it_where_layerpeft_is_not_there(folder, base_dir, tmp_path):
    ended = without_the_package(PLAIN, folder, base_dir, tmp_path / "logits.pt", cwd=tmp_path)
    assert ended.stdout.strip() == "absent", ended.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(wrapped(base_dir)), rtol=0, atol=1e-5)
