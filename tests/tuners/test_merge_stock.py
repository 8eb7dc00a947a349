"""Adapters without a record, of plain PEFT or plain LoRA on every layer: merged as PEFT itself merges them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.errors import SaveError
from layerpeft.recipe.shipped import resolve
from layerpeft.tuners.merge import merge
from tests.helpers.short import short_llama


def stirred(model: peft.PeftModel, folder: Path) -> Path:
    """With what training would have moved, saved."""
    torch.manual_seed(5)
    for name, tensor in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(str(folder))
    assert not (folder / "layerpeft.json").exists()
    return folder


def same(into: Path, kind: str, wanted: torch.nn.Module) -> None:
    """Every tensor, to the bit; the toy has no pooler, which is drawn anew whenever it is loaded."""
    found = getattr(transformers, kind).from_pretrained(into).state_dict()
    expected = wanted.state_dict()
    found, expected = ({k: t for k, t in side.items() if ".pooler." not in k} for side in (found, expected))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("made_by", ["peft", "layerpeft"])
def test_it_is_merged_as_peft_does(made_by, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(short_llama(2))
    options = {"r": 4, "target_modules": "all-linear", "use_rslora": True, "task_type": "CAUSAL_LM"}
    if made_by == "peft":
        model = peft.get_peft_model(base, peft.LoraConfig(use_dora=True, **options))
    else:
        model = get_peft_model(base, LayerLoraConfig(**options))
    folder = stirred(model, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert main(["merge", str(folder), str(tmp_path / "m")]) == 0
    assert "transformers loads by itself" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(short_llama(2))
    untouched = AutoModelForCausalLM.from_pretrained(short_llama(2))
    wanted = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)
    assert not torch.equal(*(m.model.layers[0].mlp.up_proj.weight for m in (wanted, untouched)))
    same(tmp_path / "m", "AutoModelForCausalLM", wanted)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_head_of_another_size_comes_along(tmp_path):
    toy = resolve("layerpeft://toy-bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(toy, num_labels=5)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    folder = stirred(peft.get_peft_model(model, config), tmp_path / "a")
    merge(folder, tmp_path / "m")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(toy, num_labels=5)
    wanted = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    same(tmp_path / "m", "AutoModelForSequenceClassification", wanted)


def test_what_cannot_be_merged_says_why(tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(short_llama(2))
    prompts = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    peft.get_peft_model(base, prompts).save_pretrained(str(tmp_path / "p"))
    with pytest.raises(SaveError, match="nothing to merge"):
        merge(tmp_path / "p", tmp_path / "m")
    base = AutoModelForCausalLM.from_pretrained(short_llama(2))
    folder = stirred(peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM")), tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(SaveError):
        merge(folder, tmp_path / "m")
    weights.write_bytes(whole)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | {"target_modules": ["q_proj"]}))
    with pytest.raises(SaveError, match="v_proj"):  # tensors without a place
        merge(folder, tmp_path / "m")
    (folder / "adapter_config.json").unlink()
    assert main(["merge", str(folder), str(tmp_path / "m")]) == 2
    assert (
        "adapter_model.safetensors lies there without it" in capsys.readouterr().err and not (tmp_path / "m").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["IA3", "LoHa", "VBLoRA"])
def test_other_kinds_of_adapters(kind, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(short_llama(2))
    more = {
        "IA3": {"feedforward_modules": []},
        "LoHa": {"r": 2},
        "VBLoRA": {"r": 2, "num_vectors": 8, "vector_length": 32},
    }[kind]
    config = getattr(peft, f"{kind}Config")(target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(base, config)
    for _, tensor in model.named_parameters():
        if tensor.requires_grad:
            torch.nn.init.normal_(tensor, std=0.5)
    model.save_pretrained(str(tmp_path / "a"))
    merge(tmp_path / "a", tmp_path / "m")
    base = AutoModelForCausalLM.from_pretrained(short_llama(2))
    same(
        tmp_path / "m",
        "AutoModelForCausalLM",
        peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).merge_and_unload(safe_merge=True),
    )
