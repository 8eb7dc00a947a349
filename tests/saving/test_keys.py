"""Saved keys are those of the user's own model, whatever was put around its modules; and what would load as nothing is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.errors import ConfigError, SaveError
from layerpeft.saving.manifest import read_manifest, write_manifest
from layerpeft.tuners.merge import merge
from tests.helpers.loops import adamw, llama, make_batches, step

BATCHES = make_batches()
CONFIGS = {
    "lora": lambda: LayerLoraConfig(select="last:2", r=4, task_type="CAUSAL_LM"),
    "all layers": lambda: LayerLoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "projection": lambda: LayerGaloreConfig(
        select="last:2", r=4, update_proj_gap=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
    "full": lambda: LayerFullConfig(select="last:1", task_type="CAUSAL_LM"),
}


def compiled(model):
    return torch.compile(model, backend="eager")


def by_region(model):
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


@pytest.fixture(autouse=True)
def _eager():
    torch.compiler.set_stance("force_eager")  # names are what is asked
    yield
    torch.compiler.set_stance("default")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=BATCHES[0]["input_ids"]).logits


def trained(model):
    optimizer = adamw(model)
    for batch in BATCHES[:4]:
        step(model.train(), optimizer, batch)
    return model


@pytest.mark.spread(2)
@pytest.mark.parametrize("around", [compiled, by_region])
@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_before_it_is_wrapped_a_model_saves_plain_keys(kind, around, tmp_path):
    if kind == "full" and around is by_region:
        with pytest.raises(ConfigError, match="wrap the model first, and compile"):
            get_peft_model(around(llama()), CONFIGS[kind]())
        return
    model = trained(get_peft_model(around(llama()), CONFIGS[kind]()))
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert not [k for k in load_file(tmp_path / "adapter_model.safetensors") if "_orig_mod" in k]
    assert not [k for k in peft.get_peft_model_state_dict(model) if "_orig_mod" in k]
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(plain), want, atol=1e-5, rtol=0)
    if kind != "all layers":
        torch.testing.assert_close(logits(layerpeft.load(tmp_path, llama())), want, atol=1e-5, rtol=0)
    again = get_peft_model(around(llama()), CONFIGS[kind]())
    again.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=0)


def rewritten(folder, rename):
    """The folder with other keys, and a manifest that vouches for it."""
    file = folder / "adapter_model.safetensors"
    save_file({rename(k): t for k, t in load_file(file).items() if rename(k)}, file)
    record = {
        k: v for k, v in read_manifest_as_it_is(folder).items() if k not in ("format", "versions", "files", "sha256")
    }
    write_manifest(folder, record)
    assert read_manifest(folder)


def read_manifest_as_it_is(folder):
    return json.loads((folder / "layerpeft.json").read_text())


def of_before(key):
    return key.replace("base_model.model.", "base_model.model._orig_mod.")


@pytest.mark.parametrize("target", [lambda m: m, compiled])
def test_a_folder_of_before_with_compiled_names_loads_right(target, tmp_path):
    model = trained(get_peft_model(llama(), CONFIGS["lora"]()))
    want = logits(model)
    model.save_pretrained(tmp_path / "own")
    rewritten(tmp_path / "own", of_before)
    torch.testing.assert_close(logits(layerpeft.load(tmp_path / "own", target(llama()))), want, atol=1e-6, rtol=0)
    again = get_peft_model(target(llama()), CONFIGS["lora"]())
    again.load_adapter(tmp_path / "own", "default", is_trainable=True)
    torch.testing.assert_close(logits(again), want, atol=1e-6, rtol=0)
    if target is not compiled:
        llama().save_pretrained(tmp_path / "base")
        merge(tmp_path / "own", tmp_path / "merged", base=tmp_path / "base")
        merged = type(llama()).from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(logits(merged), want, atol=1e-5, rtol=0)


WRONG = {
    "a tensor less": (
        lambda k: None if "layers.3.self_attn.q_proj.lora_B" in k else k,
        "Missing: .*lora_B",
    ),
    "a module less": (
        lambda k: None if "layers.3.self_attn.q_proj" in k else k,
        "says was chosen: model.layers.3.self_attn.q_proj",
    ),
    "another name": (lambda k: k.replace("q_proj", "Q_proj"), "lacks what layerpeft.json says was chosen: .*q_proj"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_whose_keys_do_not_fit_is_refused(what, tmp_path):
    rename, says = WRONG[what]
    trained(get_peft_model(llama(), CONFIGS["lora"]())).save_pretrained(tmp_path / "own")
    rewritten(tmp_path / "own", rename)
    with pytest.raises(SaveError, match=says):
        layerpeft.load(tmp_path / "own", llama())
    live = get_peft_model(llama(), CONFIGS["lora"]())
    before = logits(live)
    with pytest.raises(layerpeft.LayerpeftError):
        live.load_adapter(tmp_path / "own", "default")
    assert torch.equal(logits(live), before)
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(SaveError):
        merge(tmp_path / "own", tmp_path / "merged", base=tmp_path / "base")
    assert not (tmp_path / "merged").exists()


def test_a_model_around_the_model_changes_no_key(tmp_path):
    model = trained(get_peft_model(llama(), CONFIGS["lora"]()))
    model.save_pretrained(tmp_path / "a")
    around = nn.DataParallel(model)
    around.module.save_pretrained(tmp_path / "b")
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())
