"""An adapter merged into its base, as a full model that plain transformers loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import layerpeft
from layerpeft import LayerGaloreConfig, LayerLoraConfig
from layerpeft.cli import main
from layerpeft.errors import SaveError
from layerpeft.merge import merge
from tests.loops import adamw, llama, make_batches, step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["lora", "galore"])
def trained(request, base, tmp_path_factory):
    options = {"select": "last:2", "r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    kinds = {"lora": LayerLoraConfig, "galore": LayerGaloreConfig}
    more = {"update_proj_gap": 2} if request.param == "galore" else {}
    model = layerpeft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), kinds[request.param](**options, **more)
    )
    optimizer, batches = adamw(model), make_batches()
    for batch in batches[:6]:
        step(model, optimizer, batch)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        return folder, model.eval()(**batches[0]).logits


def test_the_merged_model_is_the_trained_one(trained, tmp_path):
    folder, logits = trained
    out = merge(folder, tmp_path / "merged")
    assert (out / "tokenizer.json").is_file() and not (out / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.allclose(plain(**make_batches()[0]).logits, logits, atol=1e-5)
    assert "peft" not in json.dumps(plain.config.to_dict())


def test_a_folder_that_holds_something_is_left_alone(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="is not empty"):
        merge(trained[0], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_adapter_is_refused_before_anything_is_written(trained, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in trained[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SaveError):
        merge(broken, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_command_merges_over_a_base_that_has_moved(trained, base, tmp_path, capsys):
    folder, logits = trained
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    out = tmp_path / "merged"
    out.mkdir()  # empty
    assert main(["merge", str(folder), str(out), "--base", str(moved), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == f"{out}: a full model, which transformers loads by itself"
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.allclose(plain(**make_batches()[0]).logits.float(), logits, atol=0.1)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


def test_the_command_says_what_is_wrong(trained, tmp_path, capsys):
    for words, says in (
        ([str(trained[0]), str(tmp_path / "a"), "--dtype", "bfloat61"], "Did you mean 'bfloat16'"),
        ([str(trained[0]), str(tmp_path / "a"), "--base", str(tmp_path / "nowhere")], "cannot be loaded"),
        ([str(tmp_path / "nothing"), str(tmp_path / "a")], "nothing"),
    ):
        assert main(["merge", *words]) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_quantized_base_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    config = LayerLoraConfig(select="last:2", r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    layerpeft.get_peft_model(packed, config).save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    with pytest.raises(SaveError, match="the base is quantized"):
        merge(tmp_path / "adapter", tmp_path / "merged", again)
    assert not (tmp_path / "merged").exists()
