"""Offsets of chosen heads: what trains, what stays, what is saved, loaded, resumed and merged."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import layerpeft
from layerpeft import LayerHeadConfig, LayerLoraConfig
from layerpeft.errors import ConfigError, LayerpeftError, SaveError, SelectionError, TrainingError
from layerpeft.model.heads import name_of
from layerpeft.model.layers import layer_map
from layerpeft.model.names import clean
from layerpeft.training import backward
from layerpeft.tuners.head.method import FILE
from layerpeft.tuners.merge import merge
from tests.conftest import LLAMA
from tests.helpers.loops import adamw, llama, make_batches, record, step, trained
from tests.helpers.models import MODELS
from tests.helpers.quanting import wide
from tests.helpers.short import short_llama

PAIRS = [[0, 1], [2, 3], [-1, 0]]
NAMES = [name_of(f"model.layers.{i}.self_attn.o_proj", h) for i, h in ((0, 1), (2, 3), (3, 0))]
BATCHES = make_batches()
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def qwen(kind="3"):
    """Heads of 16 in a model of 32, or without a place for the biases that they come to."""
    torch.manual_seed(0)
    if kind == "3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=4, head_dim=16))
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=4))


def gpt2():
    torch.manual_seed(0)
    still: dict[str, Any] = {
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=4, vocab_size=64, **still))


def heads(pairs=PAIRS, **options):
    return LayerHeadConfig(select={"unit": "head", "layers": pairs}, task_type="CAUSAL_LM", **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=BATCHES[0]["input_ids"]).logits


def apart(one, other):
    return float((one - other).abs().max())


def test_only_the_picked_heads_move_and_the_folder_is_a_stock_adapter(tmp_path):
    """With heads whose size is not hidden over heads: the projection reads 64 numbers in a model of 32."""
    base = qwen()
    before, off = {n: p.clone() for n, p in base.named_parameters()}, logits(base)
    model = trained(base, heads())
    assert all(torch.equal(p, before[clean(n).removeprefix("base_model.model.")]) for n, p in model.named_parameters()
               if ".lora_" not in n)  # fmt: skip
    tensors = record(model).bound.tensors()
    assert set(tensors) == set(NAMES) and all(
        g["offset"].shape == (16,) and g["offset"].any() for g in tensors.values()
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 16
    on = logits(model)
    assert apart(on, off) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    model.save_pretrained(tmp_path)
    weights, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert (config["peft_type"], config["r"], config["lora_bias"]) == ("LORA", 1, True) and len(weights) == 9
    for name, tensor in weights.items():
        if not name.endswith("lora_B.bias"):
            assert not tensor.any()
            continue
        projection = name.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
        (head,) = [n for n in NAMES if n.startswith(projection)]
        place = slice(16 * int(head[-1]), 16 * int(head[-1]) + 16)
        want = before[f"{projection}.weight"][:, place] @ tensors[head]["offset"]
        assert torch.allclose(tensor, want, atol=1e-7)
    manifest = json.loads((tmp_path / "layerpeft.json").read_text())
    assert manifest["method"] == "head" and "vLLM" in manifest["heads"]["served"] and FILE in manifest["files"]
    assert apart(logits(peft.PeftModel.from_pretrained(qwen(), tmp_path)), on) < 1e-6
    loaded = layerpeft.load(tmp_path, qwen())
    assert torch.equal(logits(loaded), on)
    reports = [layerpeft.layer_report(m) for m in (model, loaded)]
    for report in reports:
        assert report.unit == "head" and [r.name for r in report.rows if r.chosen] == NAMES and not report.notes
        assert all(r.steps == 3 and r.change for r in report.rows if r.chosen) and len(report.rows) == 16
    weight = before["model.layers.0.self_attn.o_proj.weight"][:, 16:32]
    change = (weight @ tensors[NAMES[0]]["offset"]).norm() / weight.norm()
    assert reports[1].rows[1].change == pytest.approx(change.item(), rel=1e-5)
    assert backward.where(model).layer is None or backward.where(model).bottom


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    def go_on(model, optimizer, batches):
        for batch in batches:
            step(model.train(), optimizer, batch)
        return torch.cat([g["offset"].detach() for g in record(model).bound.tensors().values()])

    for number, config in enumerate((heads(init_std=1e-3), heads(init_std=0.0))):
        model = layerpeft.get_peft_model(llama(), config)
        optimizer = adamw(model)
        assert any(g["offset"].any() for g in record(model).bound.tensors().values()) == bool(config.init_std)
        go_on(model, optimizer, BATCHES[:2])
        model.save_pretrained(tmp_path / str(number))
        states = copy.deepcopy(optimizer.state_dict())
        want = go_on(model, optimizer, BATCHES[2:4])
        live = layerpeft.get_peft_model(llama(), config)
        live.load_adapter(str(tmp_path / str(number)), "default", is_trainable=True)
        for again in (live, layerpeft.load(tmp_path / str(number), llama(), is_trainable=True)):
            other = adamw(again)
            other.load_state_dict(copy.deepcopy(states))
            assert torch.equal(go_on(again, other, BATCHES[2:4]), want)
    with pytest.raises(SelectionError, match="trains other targets"):
        layerpeft.get_peft_model(llama(), heads([[0, 1], [2, 2]])).load_adapter(str(tmp_path / "0"), "default")
    with pytest.raises(SaveError, match=f"holds no {FILE}"):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    with pytest.raises(ConfigError, match="'ref' cannot be another, nor a copy of it"):
        model.add_adapter("ref", model.peft_config["default"])


@pytest.mark.parametrize(
    "make", [llama, gpt2, pytest.param(qwen, marks=pytest.mark.slow)], ids=["llama", "gpt2", "qwen3"]
)
def test_a_merged_model_is_plain_and_says_the_same(make, tmp_path):
    make().save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), heads())
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model)
    for number, given in enumerate(({}, {"model": make()})):
        out = merge(tmp_path / "adapter", tmp_path / str(number), **given)
        plain = AutoModelForCausalLM.from_pretrained(out)
        assert apart(logits(plain), want) < 1e-5 and not hasattr(plain, "peft_config")
        biases = [n for n in plain.state_dict() if n.endswith(("o_proj.bias", "attn.c_proj.bias"))]
        assert len(biases) == 4
    if make is gpt2:  # whose projection has a bias: PEFT merges live, and back to the bit
        model.merge_adapter()
        assert apart(logits(model), want) < 1e-5
        model.unmerge_adapter()
        assert torch.equal(logits(model), want)


def test_where_the_config_has_no_place_for_a_bias_nothing_is_merged(tmp_path):
    qwen("2").save_pretrained(tmp_path / "base")
    trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), heads()).save_pretrained(tmp_path / "adapter")
    for given in ({}, {"model": qwen("2")}):
        with pytest.raises(SaveError, match="a Qwen2ForCausalLM has no place for"):
            merge(tmp_path / "adapter", tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()
    with pytest.raises(SaveError, match="biases, which PEFT does not merge into a quantized base"):
        merge(tmp_path / "adapter", tmp_path / "out", into_quantized=True, model=wide())


def test_over_a_packed_base_the_constant_is_that_of_the_packed_weights(tmp_path):
    wide().save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), heads(quantize_frozen="nf4"))
    assert "4bit" in type(model.base_model.model.model.layers[0].self_attn.o_proj).__name__
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(layerpeft.load(tmp_path / "adapter")), want)
    packed = layerpeft.load_model(tmp_path / "base", {"bits": 4})
    assert apart(logits(peft.PeftModel.from_pretrained(packed, tmp_path / "adapter")), want) < 1e-5
    with pytest.raises(ConfigError, match="into the base in 16 bit"):
        model.merge_adapter()


def test_what_would_not_train_is_refused():
    model = layerpeft.get_peft_model(llama(), heads())
    optimizer = adamw(model)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    with pytest.raises(TrainingError, match=r"o_proj.head_1: requires_grad is switched off for offset"):
        step(model, optimizer, BATCHES[0])


def test_a_choice_that_waits_keeps_the_heads_that_the_first_step_shows():
    select = {"by": "gradient_norm", "unit": "head", "keep": 3, "num_batches": 1}
    model = trained(llama(), LayerHeadConfig(select=select))
    scores = layerpeft.score_layers(llama(), "gradient_norm", unit="head", batches=BATCHES, num_batches=1)
    assert record(model).selection.layers == tuple(sorted(scores.ranked()[:3]))
    left = [n for n, _ in model.named_parameters() if ".lora_offset." in n]
    assert len(left) == 3 and not any(".lora_" in n for n, _ in model.named_modules() if n.split(".")[5:6] == ["1"])


def test_heads_that_are_chosen_again_move_by_turns(tmp_path):
    select = {"unit": "head", "pick": "cycle", "keep": 2, "reselect_steps": 1}
    model = trained(llama(), LayerHeadConfig(select=select | {"layers": "last:6"}), steps=2)
    moved = {n for n, g in record(model).bound.tensors().items() if g["offset"].any()}
    assert moved == {record(model).selection.layer_names[i] for i, n in record(model).steps_trained.items() if n}
    assert len(moved) == 4 and len(record(model).bound.tensors()) == 6
    with model.disable_adapter():
        logits(model)
    assert sum(p.requires_grad for p in model.parameters()) == 2  # PEFT opens no head that rests
    model.save_pretrained(tmp_path)
    again = layerpeft.get_peft_model(llama(), LayerHeadConfig(select=select | {"layers": "last:6"}))
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert record(again).steps_trained == record(model).steps_trained and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient_and_the_backward_pass_stops_at_the_lowest_head(reentrant):
    found = []
    for recomputes in (False, True):
        model = layerpeft.get_peft_model(llama(), heads([[2, 1], [3, 0]])).train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**BATCHES[0]).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        assert backward.where(model).layer == 2
    assert len(found[0]) == 2 and all(map(torch.equal, *found))


def test_where_the_projection_is_divided_it_is_refused_before_anything_is_wrapped(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    model = llama()
    with pytest.raises(ConfigError, match="under FSDP2; use DDP, ZeRO-1 or ZeRO-2"):
        layerpeft.get_peft_model(model, heads())
    assert not any("lora" in n for n, _ in model.named_parameters())


@pytest.mark.slow
def test_dpo_takes_the_base_as_its_reference(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"Q{i}", "chosen": " good yes", "rejected": " bad no"} for i in range(8)]
    plain = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(short_llama(3)),
        args=DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, **plain),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(LLAMA),
        peft_config=heads([[1, 1], [2, 0]]),
    )
    trainer.train()
    base = logits(AutoModelForCausalLM.from_pretrained(short_llama(3)))
    assert apart(logits(trainer.model), base) > 1e-4
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), base)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: heads(r=4, target_modules=["q_proj"]), "r=4: LoRA's own"),
        (lambda: heads(quantize_trained="nf4"), "write quantize_frozen"),
        (lambda: LayerHeadConfig(select={"unit": "sublayer", "layers": 0}), "sublayers are not what trains here"),
        (lambda: LayerLoraConfig(select={"unit": "head", "layers": 0}), "with method: head alone"),
        (lambda: heads([[0, 1], 2]), r"write \[\[layer, head\], …\]"),
        (lambda: heads().resolve(llama()), "no stock config"),
        (lambda: layerpeft.get_peft_model(llama(), heads([[9, 0], [0, 7]])), "(?s)layer 9 has no heads.*heads 0 to 3"),
        (lambda: layerpeft.get_peft_model(MODELS["mamba"](), heads([0])), "mamba has no attention whose heads"),
        (lambda: layerpeft.get_peft_model(MODELS["nanogpt"](), heads([0])), "does not follow from the config"),
        (
            lambda: layerpeft.get_peft_model(
                llama(), LayerHeadConfig(select={"by": "gradient_norm", "unit": "head", "keep": 1}, init_std=1e-3)
            ),
            "would change what heads give out",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(make, words):
    with pytest.raises(LayerpeftError, match=words):
        make()


def test_heads_are_counted_by_what_the_projection_reads():
    """Multi-head latent attention has values of a size of their own; of hybrids the layers with attention have heads."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    latent: dict[str, Any] = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 12,
    }
    sizes |= SIZES | latent | {"moe_intermediate_size": 16, "first_k_dense_replace": 2, "num_key_value_heads": 4}
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
    found = {t.shape: t.heads for t in layer_map(model).targets if t.heads}
    assert found == {(32, 48): 4}
    jamba = layer_map(MODELS["jamba"]())
    assert [t.layer for t in jamba.targets if t.heads] == [1]


@pytest.mark.pictures
def test_the_picture_is_a_map_of_layers_and_heads(tmp_path):
    from layerpeft.training.pictures import _grid

    select = {"by": "weight_norm", "unit": "head", "keep": 3}
    model = layerpeft.get_peft_model(llama(), LayerHeadConfig(select=select))
    rows = layerpeft.layer_report(model).rows
    figure = _grid(rows, "by weight_norm", "head")
    (shown,) = figure.axes[0].images
    want = [[r.score for r in rows[i : i + 4]] for i in range(0, 16, 4)]
    assert all(a == pytest.approx(b) for a, b in zip(shown.get_array().tolist(), want, strict=True))
    framed = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in figure.axes[0].patches}
    assert framed == {divmod(i, 4) for i in record(model).selection.layers}
    model.save_pretrained(tmp_path)
    assert (tmp_path / "layers.png").stat().st_size > 1000
