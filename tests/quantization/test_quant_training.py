"""Training over quantized layers: what was chosen trains in 16 bit (or under adapters), the rest is packed and stays put."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, LayerQuantConfig, quantize
from layerpeft.errors import ConfigError, QuantizationError, SelectionError
from layerpeft.model import precisions
from layerpeft.model.layers import base_of
from layerpeft.model.precisions import KEPT, tensor_bytes
from layerpeft.planning.plan import plan
from layerpeft.selection.probe import attach_taps
from tests.conftest import LLAMA
from tests.helpers.loops import BY_GRADIENT, adamw, record
from tests.helpers.processes import in_a_process, without_the_package
from tests.helpers.quanting import BATCHES, kinds, logits, train, wide, wrap
from tests.helpers.traffic import watched
from tests.helpers.training import gsm8k_rows, sft

pytest.importorskip("bitsandbytes")
pytest.importorskip("hqq")
FROZEN = {0: {"nf4"}, 1: {"nf4"}, 2: {KEPT}, 3: {KEPT}}


def packed(model):
    """Bytes of everything that is stored in integers, and of all that is frozen."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", [LayerLoraConfig, LayerGaloreConfig, LayerFullConfig])
@pytest.mark.parametrize("precision", ["nf4", "int8", 2, "fp4"])
def test_layers_that_do_not_train_are_packed_and_stay_as_they_are(kind, precision):
    model = wrap(kind=kind, quantize_frozen=precision)
    name = precisions.named(precision)
    assert kinds(model) == {0: {name}, 1: {name}, 2: {KEPT}, 3: {KEPT}}
    before = packed(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".layers.2." in n or ".layers.3." in n for n in trained)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n in trained}
    train(model)
    now = dict(model.named_parameters())
    if kind is not LayerGaloreConfig:  # which folds into weights that it wraps
        assert all(torch.equal(now[n], p) for n, p in before.items() if n in now)
    assert all(not torch.equal(now[n], p) for n, p in start.items() if ".lora_A" not in n or kind is LayerLoraConfig)
    quantized = record(model).quantized
    assert all(r.asked == r.got for r in quantized.rows) and len(quantized.assignment) == 14
    assert "14" in quantized.why and tensor_bytes(base_of(model)) < 0.8 * tensor_bytes(wrap(kind=kind))


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", [LayerLoraConfig, LayerGaloreConfig])
@pytest.mark.parametrize("precision", ["nf4", "int8", 3])
def test_adapters_over_quantized_layers_train_too(kind, precision):
    model = train(wrap(kind=kind, quantize_frozen=2, quantize_trained=precision))
    name = precisions.named(precision)
    assert kinds(model) == {0: {"hqq2"}, 1: {"hqq2"}, 2: {name}, 3: {name}}
    wanted = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "hqq3": "HqqLoraLinear"}[name]
    if kind is LayerLoraConfig:  # PEFT's own class for that kind, which knows how to merge it
        assert type(base_of(model).model.layers[3].self_attn.q_proj).__name__ == wanted
    everything = train(wrap(select="all", kind=kind, quantize_trained=precision))
    assert kinds(everything) == {i: {name} for i in range(4)}


def test_it_is_the_same_as_quantizing_first_and_wrapping_then():
    by_config, by_hand = wrap(quantize_frozen="nf4"), wide()
    quantize(by_hand, {"select": "first:2", "bits": "nf4"})
    by_hand = wrap(by_hand)
    for model in (by_config, by_hand):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_A" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        train(model)
    assert torch.equal(logits(by_config), logits(by_hand))


def test_four_precisions_in_one_model_made_step_by_step(tmp_path):
    """LoRA on a 16-bit layer and on a 4-bit one; the others in int8 and 2 bits."""
    wide(torch.bfloat16).save_pretrained(tmp_path / "base")

    def base():
        model = layerpeft.load_model(tmp_path / "base", {"select": [0], "bits": 2}, dtype=torch.bfloat16)
        quantize(model, {"select": [1], "bits": 8})
        return quantize(model, {"select": [2], "bits": "nf4"}) and model

    model = train(wrap(base()), 6)
    assert kinds(model) == {0: {"hqq2"}, 1: {"int8"}, 2: {"nf4"}, 3: {KEPT}}
    assert {n.split(".")[4] for n, p in model.named_parameters() if p.requires_grad} == {"2", "3"}
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(layerpeft.load(tmp_path / "adapter", base())), expected)


FRESH = """
import sys, torch, layerpeft
folder, ids, place = sys.argv[1:]
model = layerpeft.load(folder).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, place)
"""
STRANGER = """
import sys
sys.modules["layerpeft"] = None
import torch
from peft import AutoPeftModelForCausalLM
folder, ids, place = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, place)
"""


def told_by(start, code, folder, tmp_path):
    torch.save(BATCHES[0]["input_ids"], tmp_path / "ids.pt")
    done = start(code, folder, tmp_path / "ids.pt", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "logits.pt")


def test_four_precisions_by_config_load_again_in_a_fresh_process_and_without_the_package(tmp_path):
    wide(torch.bfloat16).save_pretrained(tmp_path / "base")
    quant = {"bits": {0: 2, 1: "int8", 2: "nf4", 3: 16}}
    config = LayerLoraConfig(select=[2, 3], r=4, task_type="CAUSAL_LM", quant=quant)
    base = layerpeft.load_model(tmp_path / "base", config, dtype=torch.bfloat16)
    assert kinds(base) == {0: {"hqq2"}, 1: {"int8"}, 2: {"nf4"}, 3: {KEPT}}, "stored while it was loaded"
    model = train(layerpeft.get_peft_model(base, config), 6)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "layerpeft.json").read_text())
    assert saved["quant"]["modules"]["model.layers.1.mlp.up_proj"] == "int8" and saved["quant"]["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert torch.equal(told_by(in_a_process, FRESH, tmp_path / "adapter", tmp_path), expected)
    # over the 16-bit base, so but for the rounding
    plain = told_by(without_the_package, STRANGER, tmp_path / "adapter", tmp_path)
    assert 0 < float((plain - expected).abs().max()) < 0.6 * float(expected.abs().max())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in n and (".layers.2." in n or ".layers.3." in n) for n in tensors)


def test_a_base_in_16_bit_is_noted_and_quantized_again_by_its_record(tmp_path, monkeypatch):
    base = wide(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    model = train(wrap(base, quantize_frozen="nf4"))
    model.save_pretrained(tmp_path / "adapter")
    expected, notes = logits(model), []
    monkeypatch.setattr("layerpeft.tuners.load.note", notes.append)
    other = logits(layerpeft.load(tmp_path / "adapter", wide(torch.bfloat16)))
    assert any("trained over a base that was quantized" in n for n in notes) and not torch.equal(other, expected)
    again = wide(torch.bfloat16)
    quantize(again, tmp_path / "adapter")
    assert torch.equal(logits(layerpeft.load(tmp_path / "adapter", again)), expected)
    with pytest.raises(QuantizationError, match="no record of precisions"):
        quantize(wide(), tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(layerpeft.LayerpeftError):
        layerpeft.load(tmp_path / "adapter")


# ---- a choice by data -----------------------------------------------------------------------------------------------


def test_a_choice_by_data_is_made_on_16_bit_weights_before_anything_is_packed():
    early = wrap(select=BY_GRADIENT, quantize_frozen="nf4", batches=BATCHES[:2])
    plain = wrap(select=BY_GRADIENT, batches=BATCHES[:2])
    chosen = record(early).selection.layers
    assert chosen == record(plain).selection.layers
    assert kinds(early) == {i: {KEPT} if i in chosen else {"nf4"} for i in range(4)}
    assert record(early).selection.scores.values == record(plain).selection.scores.values


def test_a_choice_that_waits_packs_the_rest_when_it_is_made():
    model = wrap(select={**BY_GRADIENT, "num_batches": 1}, quantize_frozen="nf4")
    assert set.union(*kinds(model).values()) == {KEPT} and record(model).quantized is None
    train(model, 3)
    chosen = record(model).selection.layers
    assert kinds(model) == {i: {KEPT} if i in chosen else {"nf4"} for i in range(4)}
    assert len(record(model).quantized.assignment) == 14 and not any("lora" in n for n in record(model).quantized.left)
    twin = wrap(select={**BY_GRADIENT, "num_batches": 1}, quantize_frozen="nf4", quantize_trained="nf4")
    assert kinds(twin) == {i: {"nf4"} for i in range(4)}, "nothing hangs on the choice"
    train(twin, 3)
    with pytest.raises(ConfigError, match="layers that train cannot be quantized any more then; pass batches"):
        wrap(select=BY_GRADIENT, quantize_frozen="nf4", quantize_trained="int8")


def test_one_iterator_of_batches_serves_both_choices():
    quant = {"mean_bits": 4.2, "objective": "kl", "select": {"num_batches": 2}}
    model = wrap(select={**BY_GRADIENT, "num_batches": 2}, quant=quant, batches=iter(BATCHES[:3]))
    listed = wrap(select={**BY_GRADIENT, "num_batches": 2}, quant=quant, batches=BATCHES[:3])
    assert record(model).quantized.modules == record(listed).quantized.modules
    assert record(model).selection.layers == record(listed).selection.layers


def test_a_quant_block_can_keep_to_the_frozen_or_the_trained_part():
    frozen = wrap(quant={"bits": 8, "apply_to": "frozen"})
    assert kinds(frozen) == {0: {"int8"}, 1: {"int8"}, 2: {KEPT}, 3: {KEPT}}
    trained = wrap(quant=LayerQuantConfig(select=[3], bits=4, rest=8, apply_to="trained"))
    assert kinds(trained) == {0: {KEPT}, 1: {KEPT}, 2: {"int8"}, 3: {"nf4"}}
    budget = wrap(wide(torch.bfloat16), quant={"mean_bits": 4.2, "apply_to": "frozen"})
    assert kinds(budget)[2] == {KEPT} and KEPT not in kinds(budget)[0]
    full = train(wrap(kind=LayerFullConfig, quant={"bits": 4, "apply_to": "frozen"}))
    assert kinds(full) == FROZEN and not hasattr(base_of(full), "is_loaded_in_4bit")


# ---- layers that change ---------------------------------------------------------------------------------------------


TURNS = {"pick": "uniform", "keep": 1, "reselect_steps": 1}


def test_layers_that_train_by_turns_are_not_packed_while_they_rest():
    for kind in (LayerLoraConfig, LayerFullConfig):
        with pytest.raises(ConfigError, match="a layer that is switched on needs its original 16-bit weights"):
            wrap(kind=kind, select=TURNS, quantize_frozen="nf4")
        with pytest.raises(ConfigError, match="switched on needs its original"):
            plan(wide(), kind(select=TURNS, quantize_frozen="nf4", task_type="CAUSAL_LM"))
        model = train(wrap(kind=kind, select={**TURNS, "layers": "last:2"}, quantize_frozen="nf4"), 6)
        assert kinds(model) == FROZEN
    both = train(wrap(select=TURNS, quantize_frozen="nf4", quantize_trained="nf4"), 6)
    assert kinds(both) == {i: {"nf4"} for i in range(4)}


# ---- what cannot be -------------------------------------------------------------------------------------------------


def test_what_contradicts_itself_is_refused_before_anything_happens():
    refused = [
        ({"quantize_frozen": "nf4", "select": "all"}, "all 4 layers train.*quantize_trained='nf4'"),
        ({"quantize_frozen": "nf4", "quant": {"bits": 4}}, "two ways to say the same"),
        ({"quantize_frozen": 16}, "16 bit is what happens without it"),
        ({"quantize_frozen": "nf4", "kind": LayerFullConfig, "quantize_trained": 8}, "cannot be trained themselves"),
        ({"quant": {"bits": 4}, "kind": LayerFullConfig}, "write apply_to: frozen"),
        ({"quantize_trained": "nf4", "layers_to_transform": [1], "select": "all"}, "say it in select alone"),
        ({"quant": "nf4"}, "expected a LayerQuantConfig or a dict"),
        ({"quant": {"mean_bits": 4.5, "objective": "kl"}}, "pass batches"),
    ]
    for options, words in refused:
        model = wide()
        with pytest.raises(ConfigError, match=words):
            wrap(model, **options)
        assert set.union(*kinds(model).values()) == {KEPT} and not any("lora" in n for n, _ in model.named_modules())
    with pytest.raises(ConfigError, match="quantize.model, .*first"):
        LayerLoraConfig(select="last:1", quantize_frozen="nf4").resolve(wide())
    with pytest.raises(SelectionError):
        wrap(quant={"select": [9], "bits": 4})


# ---- measured over quantized layers ---------------------------------------------------------------------------------


@pytest.mark.spread(3)
@pytest.mark.parametrize("precision", ["nf4", "int8", 2])
def test_the_probe_and_the_scorers_read_quantized_layers(precision):
    model, plain = wide(), wide()
    found = quantize(model, {"bits": precision})
    for name, kind in found.assignment.items():
        linear = plain.get_submodule(name)
        linear.weight.data = precisions.rounded(linear.weight.data, kind, found.storage)
    for by, options in (
        ("gradient_norm", {"exact": True}),
        ("gradient_norm", {}),
        ("outliers", {"M": 2.0}),
        ("snr", {}),
    ):
        ours = layerpeft.score_layers(model, by, batches=BATCHES[:2], target_modules="all-linear", **options)
        theirs = layerpeft.score_layers(plain, by, batches=BATCHES[:2], target_modules="all-linear", **options)
        assert ours.values == pytest.approx(theirs.values, rel=5e-3)
    assert attach_taps is not None


def test_the_backward_pass_stops_above_quantized_layers():
    model = wrap(quantize_frozen="nf4").train()
    model.enable_input_require_grads()
    with watched(model) as seen:
        model(**BATCHES[0]).loss.backward()
    assert seen.text("reached") == "0011" and seen.text("forward") == "1111"


@pytest.mark.spread(3)
@pytest.mark.parametrize(
    "options",
    [
        {"quantize_frozen": "nf4"},
        {"quantize_frozen": 2, "quantize_trained": "int8"},
        {"kind": LayerFullConfig, "quantize_frozen": "nf4"},
        {"kind": LayerGaloreConfig, "quantize_frozen": 3, "quantize_trained": "nf4"},
        {"quant": {"mean_bits": 4.2}, "select": "all"},
        {"select": {**TURNS, "layers": "last:2"}, "quantize_frozen": "int8"},
    ],
    ids=str,
)
def test_a_plan_counts_the_bytes_that_wrapping_comes_to(options):
    kind = options.pop("kind", LayerLoraConfig)
    given = {"select": "last:2", "task_type": "CAUSAL_LM", **({} if kind is LayerFullConfig else {"r": 4}), **options}
    base = wide(torch.bfloat16)
    found = plan(base, kind(**given), batch_size=1, length=8)
    assert any("as loaded" in line for line in found.assumed) and any(
        "already peaks at" in line for line in found.assumed
    )
    model = layerpeft.get_peft_model(base, kind(**given))
    # a budget is spent by scores, which a plan takes to be equal
    assert found.weights == pytest.approx(tensor_bytes(model), rel=0.05 if "quant" in options else 0.02)
    options["kind"] = kind


# ---- trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", [LayerLoraConfig, LayerFullConfig])
def test_trl_trains_it_and_a_resumed_run_equals_an_unbroken_one(tmp_path, kind):
    rows = gsm8k_rows()
    given = {"select": "last:2", "quantize_frozen": "nf4", "task_type": "CAUSAL_LM"} | (
        {"r": 4} if kind is LayerLoraConfig else {"target_modules": ["q_proj", "v_proj"]}
    )
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
    }

    def trainer(folder):
        torch.manual_seed(0)
        return sft(rows, folder, kind(**given), **options)

    whole = trainer(tmp_path / "a")
    assert {p.dtype for p in whole.model.parameters() if p.requires_grad} == {torch.float32}, (
        "TRL casts QLoRA's, not these"
    )
    whole.train()
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = dict(whole.model.named_parameters()), dict(again.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert precisions.precision_of(base_of(whole.model).model.layers[0].mlp.up_proj) == "nf4"
    other = sft(rows, tmp_path / "c", kind(**{**given, "quantize_frozen": "int8"}), **options)
    with pytest.raises(SelectionError, match="stored .* in other precisions"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_a_copy_of_a_quantized_model_is_one_of_its_own():
    model = wrap(quantize_frozen=2, quantize_trained="nf4")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(model), logits(twin))
    train(twin, 2)
    assert not torch.equal(logits(model), logits(twin)) and kinds(twin) == kinds(model)
    with model.disable_adapter():
        base = logits(model)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), base)
    assert isinstance(model, peft.PeftModel) and adamw(model) is not None and LLAMA.is_dir()


@pytest.mark.spread(3)
@pytest.mark.parametrize("precision", ["nf4", "int8", 3])
def test_a_projection_over_packed_layers_merges_and_comes_back(precision):
    model = train(wrap(kind=LayerGaloreConfig, quantize_frozen=2, quantize_trained=precision, update_proj_gap=2), 7)
    before = logits(model)
    model.merge_adapter()
    merged = logits(model)
    assert 0 < float((merged - before).abs().max()) < 0.5 * float(before.abs().max()), "rounded once more"
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_what_was_quantized_by_hand_is_in_the_record_too(tmp_path):
    wide(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = layerpeft.load_model(tmp_path / "base", {"select": [1], "bits": 8}, dtype=torch.bfloat16)
    quantize(base, {"select": [0], "bits": "nf4"})
    model = train(wrap(base))
    model.save_pretrained(tmp_path / "adapter")
    assert record(model).quantized.assignment["model.layers.1.mlp.up_proj"] == "int8"
    again = layerpeft.load(tmp_path / "adapter")
    assert kinds(again) == kinds(model) == {0: {"nf4"}, 1: {"int8"}, 2: {KEPT}, 3: {KEPT}}
    assert torch.equal(logits(again), logits(model))


def test_an_int8_base_goes_on_after_reports_and_saves(tmp_path):
    model = wrap(quantize_trained=8)
    train(model, 2)
    before = logits(model)
    layerpeft.layer_report(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), before)
    train(model, 2)


def test_what_peft_would_refuse_over_packed_weights_is_told_before_they_are_packed():
    refused = [
        ({"quantize_trained": "nf4", "init_lora_weights": "pissa"}, "takes something out of weights that are packed"),
        ({"quantize_trained": 2, "init_lora_weights": "olora"}, "takes something out"),
        ({"quantize_trained": 2, "lora_bias": True}, "lora_bias=True"),
        ({"quantize_frozen": "nf4", "r": 0}, "r=0 is not a whole number"),
        ({"quantize_frozen": "nf4", "modules_to_save": ["model.layers.0.mlp"]}, "trains whole, and .*layers.0.mlp"),
    ]
    for options, words in refused:
        model = wide()
        with pytest.raises(ConfigError, match=words):
            wrap(model, **options)
        assert set.union(*kinds(model).values()) == {KEPT}
        with pytest.raises(ConfigError, match=words):
            plan(wide(), LayerLoraConfig(**{"select": "last:2", "r": 4, "task_type": "CAUSAL_LM", **options}))
    with pytest.raises(ConfigError, match="quantize_frozen=2 would do nothing"):
        wrap(select=TURNS, quantize_frozen=2, quantize_trained="nf4")
    assert kinds(wrap(select={**BY_GRADIENT, "num_batches": 1}, quantize_frozen="nf4", quantize_trained=4))[0] == {
        "nf4"
    }


def test_a_plan_says_where_the_whole_model_has_to_be_loaded_first():
    def said(**options):
        found = plan(wide(), LayerLoraConfig(**{"select": "last:2", "r": 4, "task_type": "CAUSAL_LM", **options}))
        return " ".join(found.assumed)

    assert "one that layerpeft loads (recipes, load_model) at" in said(quantize_frozen="nf4")
    assert "and so does one that layerpeft loads" in said(quantize_frozen="nf4", select=BY_GRADIENT)
    assert "which bits is not known yet" in said(quant={"mean_bits": 4.5})


def test_a_resumed_run_has_to_pack_alike(tmp_path):
    rows = gsm8k_rows()
    options = {"save_strategy": "steps", "save_steps": 2, "bf16": False, "model_init_kwargs": {"dtype": "float32"}}

    def trainer(folder, group_size, **more):
        quant = {"bits": 2, "apply_to": "frozen", "group_size": group_size}
        return sft(
            rows, folder, LayerLoraConfig(select="last:1", r=4, task_type="CAUSAL_LM", quant=quant), **options, **more
        )

    trainer(tmp_path / "a", 64, max_steps=2).train()
    with pytest.raises(SelectionError, match="(?s)in other precisions.*group_size=64.*group_size=32"):
        trainer(tmp_path / "b", 32, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_what_was_quantized_while_it_was_loaded_is_in_the_record_too(tmp_path):
    wide(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = layerpeft.load_model(tmp_path / "base", {"select": [1], "bits": 8}, dtype=torch.bfloat16)
    model = train(wrap(base))
    model.save_pretrained(tmp_path / "adapter")
    again = layerpeft.load(tmp_path / "adapter")
    assert kinds(again) == kinds(model) and torch.equal(logits(again), logits(model))
