"""Unlocked norms, scales and biases of linears: what trains, what stays, what is saved, loaded, resumed and merged."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import layerpeft
from layerpeft import LayerHeadConfig, LayerUnlockConfig
from layerpeft.errors import ConfigError, LayerpeftError, SaveError, SelectionError
from layerpeft.model.names import clean
from layerpeft.planning.parts import training
from layerpeft.planning.plan import wrapped
from layerpeft.planning.trace import Step
from layerpeft.training import backward
from layerpeft.tuners.merge import merge
from layerpeft.tuners.unlock.method import FILE
from tests.conftest import LLAMA
from tests.helpers.loops import adamw, llama, make_batches, record, step, trained
from tests.helpers.quanting import wide
from tests.helpers.short import short_llama
from tests.tuners.head.test_head import apart, gpt2, logits, qwen

BATCHES = make_batches()
PREFIX = "base_model.model."


def unlock(select: Any = (1, -1), **options):
    select = list(select) if isinstance(select, tuple) else select
    return LayerUnlockConfig(select=select, task_type="CAUSAL_LM", **options)


def tensors_of(model):
    return record(model).bound.tensors()


def names_of(model):
    return set(tensors_of(model))


def plain(model):
    """The tensors of a model, by its own names, without any adapter's."""
    found = {n.removeprefix(PREFIX): p for n, p in model.named_parameters()}
    return {
        clean(n): p.detach().clone() for n, p in found.items() if ".lora_" not in n and ".modules_to_save." not in n
    }


def test_what_was_picked_moves_and_the_result_is_what_the_formula_says(tmp_path):
    base = llama()
    before, off = plain(base), logits(base)
    model = layerpeft.get_peft_model(base, unlock())
    assert torch.equal(logits(model), off)
    model = trained(llama(), unlock())
    after = plain(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    tensors = tensors_of(model)
    assert len(tensors) == 2 * (7 + 2) and {n.split(".")[2] for n in tensors} == {"1", "3"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for group in tensors.values() for p in group.values()
    )
    on = logits(model)
    assert apart(on, off) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    by_hand = llama(attention_bias=True, mlp_bias=True)
    state = by_hand.state_dict() | before
    for name, group in tensors.items():
        if "norm" in name:
            state[f"{name}.weight"] = group["weight"].detach()
            assert not torch.equal(state[f"{name}.weight"], before[f"{name}.weight"])
            continue
        scale, shift = (group[f"lora_magnitude_vector.{part}"].detach() for part in ("scale", "shift"))
        assert (scale != 1).any() and (shift != 0).any()
        state |= {f"{name}.weight": scale[:, None] * before[f"{name}.weight"], f"{name}.bias": scale * shift}
    by_hand.load_state_dict(state)
    assert apart(logits(by_hand), on) < 1e-6
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["peft_type"], said["use_dora"], said["bias"], said["r"]) == ("LORA", True, "lora_only", 1)
    manifest = json.loads((tmp_path / "layerpeft.json").read_text())
    assert "attention_bias=True, mlp_bias=True" in manifest["unlock"]["served"] and FILE in manifest["files"]
    with_places = llama(attention_bias=True, mlp_bias=True)
    with_places.load_state_dict(with_places.state_dict() | before)
    assert apart(logits(peft.PeftModel.from_pretrained(with_places, tmp_path)), on) < 1e-6
    for trainable in (False, True):
        loaded = layerpeft.load(tmp_path, llama(), is_trainable=trainable)
        assert torch.equal(logits(loaded), on)
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), off)
    reports = [layerpeft.layer_report(m) for m in (model, loaded)]
    rows = [[(r.chosen, r.steps, r.change) for r in report.rows] for report in reports]
    assert rows[0] == rows[1] and not any(report.notes for report in reports)
    assert [r[0] for r in rows[0]] == [False, True, False, True] and all(r[2] for r in rows[0] if r[0])
    change = sum(float((state[n] - before.get(n, 0)).square().sum()) for n in state if ".layers.1." in n)
    weight = sum(float(before[n].square().sum()) for n in before if ".layers.1." in n)
    assert rows[0][1][2] == pytest.approx((change / weight) ** 0.5, rel=1e-4)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    def go_on(model, optimizer, batches):
        for batch in batches:
            step(model.train(), optimizer, batch)
        return torch.cat([p.detach() for g in tensors_of(model).values() for p in g.values()])

    config = unlock(modules_to_save=["model.norm"])
    model = layerpeft.get_peft_model(llama(), config)
    optimizer = adamw(model)
    go_on(model, optimizer, BATCHES[:2])
    model.save_pretrained(tmp_path)
    states = copy.deepcopy(optimizer.state_dict())
    want, last = go_on(model, optimizer, BATCHES[2:4]), logits(model)
    live = layerpeft.get_peft_model(llama(), config)
    live.load_adapter(str(tmp_path), "default", is_trainable=True)
    for again in (live, layerpeft.load(tmp_path, llama(), is_trainable=True)):
        other = adamw(again)
        other.load_state_dict(copy.deepcopy(states))
        assert torch.equal(go_on(again, other, BATCHES[2:4]), want) and torch.equal(logits(again), last)
    with pytest.raises(SelectionError, match="trains other targets"):
        layerpeft.get_peft_model(llama(), unlock((0, 2))).load_adapter(str(tmp_path), "default")
    with pytest.raises(SaveError, match=f"holds no {FILE}"):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    with pytest.raises(ConfigError, match="'ref' cannot be another, nor a copy of it"):
        model.add_adapter("ref", model.peft_config["default"])
    whole = layerpeft.get_peft_model(llama(), config)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(logits(whole), logits(model))
    part = layerpeft.get_peft_model(llama(), config)  # as of an engine's checkpoint, which leaves out what is frozen
    part.load_state_dict({n: p for n, p in model.named_parameters() if p.requires_grad}, strict=False)
    assert torch.equal(logits(part), logits(model))


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (llama, {}),
        (gpt2, {}),
        pytest.param(qwen, {"biases": False}, marks=pytest.mark.slow),
        pytest.param(llama, {"target_modules": ["o_proj", "down_proj"]}, marks=pytest.mark.slow),
    ],
    ids=["llama", "gpt2", "scales alone", "some linears"],
)
def test_a_merged_model_is_plain_and_says_the_same(make, given, tmp_path):
    make().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), unlock(**given))
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model)
    for number, whole in enumerate(({}, {"model": make()})):
        out = merge(tmp_path / "adapter", tmp_path / str(number), **whole)
        both: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        loaded, problems = both
        assert not any(problems[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert apart(logits(loaded), want) < 1e-5 and not hasattr(loaded, "peft_config")
    files = [
        {n: t for f in sorted((tmp_path / n).glob("*.safetensors")) for n, t in load_file(f).items()} for n in "01"
    ]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][n], files[1][n]) for n in files[0])
    if make is gpt2:  # whose linears have biases: PEFT merges live, and back to the bit
        kept = plain(model)
        model.merge_adapter()
        assert apart(logits(model), want) < 1e-5
        model.unmerge_adapter()
        assert torch.equal(logits(model), want) and all(torch.equal(t, kept[n]) for n, t in plain(model).items())
        base = peft.utils.get_base_model_state_dict(model)
        assert all(torch.equal(t, base[n]) for n, t in make().state_dict().items()) and len(base) == len(
            make().state_dict()
        )
        torch.save(model, tmp_path / "pickled.pt")
        torch.load(tmp_path / "pickled.pt", weights_only=False).save_pretrained(tmp_path / "pickled")
        assert apart(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "pickled")), want) < 1e-5
        assert apart(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")), want) < 1e-5


def test_linears_that_can_hold_no_bias_are_refused_by_name_before_anything_is_wrapped():
    model = qwen("2")
    with pytest.raises(ConfigError) as found:
        layerpeft.get_peft_model(model, unlock())
    text = str(found.value)
    assert "a Qwen2ForCausalLM has no place for" in text and not any("lora" in n for n, _ in model.named_parameters())
    assert "(exclude_modules: [down_proj, gate_proj, o_proj, up_proj])" in text
    ends = text.partition("exclude_modules: [")[2].partition("]")[0].split(", ")
    left = names_of(layerpeft.get_peft_model(qwen("2"), unlock(exclude_modules=ends)))
    assert {n.rpartition(".")[2] for n in left if "norm" not in n} == {"q_proj", "k_proj", "v_proj"}
    model = layerpeft.get_peft_model(qwen("2"), unlock(biases=False))
    assert len(names_of(model)) == 2 * 9 and not any("shift" in n for n, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["nf4", 3], ids=["nf4", "hqq"])
def test_over_a_packed_base_scales_and_biases_train_and_merge_into_the_unpacked_one(bits, tmp_path):
    wide().save_pretrained(tmp_path / "base")
    config = unlock("last:2", quantize_frozen=bits, quantize_trained=bits)
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(layerpeft.load(tmp_path / "adapter")), want)
    own = tensors_of(model)["model.layers.3.mlp.up_proj"]
    out = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "out"))
    start: Any = wide()
    weight = start.model.layers[3].mlp.up_proj.weight * own["lora_magnitude_vector.scale"][:, None]
    assert torch.equal(out.model.layers[3].mlp.up_proj.weight, weight)
    with pytest.raises(SaveError, match="biases, which PEFT does not merge into a quantized base"):
        merge(tmp_path / "adapter", tmp_path / "more", into_quantized=True, model=wide())


@pytest.mark.slow
def test_a_choice_that_waits_keeps_the_layers_that_the_first_step_shows():
    select = {"by": "gradient_norm", "keep": 2, "num_batches": 1}
    model = trained(llama(), unlock(select))
    scores = layerpeft.score_layers(
        llama(), "gradient_norm", batches=BATCHES, num_batches=1, target_modules="all-linear"
    )
    assert record(model).selection.layers == tuple(sorted(scores.ranked()[:2]))
    left = {n.split(".layers.")[1][0] for n, _ in model.named_parameters() if ".lora_" in n or ".modules_to_save." in n}
    assert left == set(map(str, record(model).selection.layers))


def test_layers_that_are_chosen_again_move_by_turns_and_go_on(tmp_path):
    select = {"pick": "cycle", "order": "ascending", "keep": 1, "reselect_steps": 1}
    model = trained(llama(), unlock(select), steps=2)
    untrained = layerpeft.get_peft_model(llama(), unlock(select))
    start = tensors_of(untrained)
    now = tensors_of(model)
    moved = {t for t in now if all(not torch.equal(p, start[t][n]) for n, p in now[t].items())}
    still = {t for t in now if all(torch.equal(p, start[t][n]) for n, p in now[t].items())}
    assert {t.split(".")[2] for t in moved} == {"0", "1"} and len(moved) == 18 and still == now.keys() - moved
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        logits(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == training  # PEFT opens nothing that rests
    model.save_pretrained(tmp_path)
    again = layerpeft.get_peft_model(llama(), unlock(select))
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert record(again).steps_trained == record(model).steps_trained and torch.equal(logits(again), logits(model))


@pytest.mark.slow
def test_the_backward_pass_stops_at_the_lowest_layer_and_checkpointing_changes_no_gradient():
    found = []
    for recomputes in (False, True):
        model = layerpeft.get_peft_model(llama(), unlock("last:2")).train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**BATCHES[0]).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        assert backward.where(model).layer == 2
    assert len(found[0]) == 2 * (7 * 2 + 2) and all(map(torch.equal, *found))


@pytest.mark.slow
def test_a_plan_counts_what_trains(tmp_path):
    llama().save_pretrained(tmp_path)
    found, _ = wrapped(str(tmp_path), unlock("last:2"), [], Step())
    cost = training(found, "adamw_torch", None)
    model = layerpeft.get_peft_model(llama(), unlock("last:2"))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (cost.trainable, cost.gradients) == (count, 4 * count) and cost.states >= 8 * count
    base = sum(p.numel() for p in llama().parameters())
    factors = sum(p.numel() for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n)
    assert found.weights == 4 * (base + factors + count) + sum(b.nbytes for b in llama().buffers())


def test_a_smaller_unit_takes_along_the_norms_that_lie_in_it():
    kept = names_of(layerpeft.get_peft_model(qwen("3"), unlock({"unit": "sublayer", "layers": [0]}, biases=False)))
    ends = {n.removeprefix("model.layers.0.self_attn.") for n in kept}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


def test_where_weights_are_divided_it_is_refused_before_anything_is_wrapped(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match="under FSDP2; use DDP, ZeRO-1 or ZeRO-2"):
        layerpeft.get_peft_model(llama(), unlock())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dpo_takes_the_base_as_its_reference(dtype, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"Q{i}", "chosen": " good yes", "rejected": " bad no"} for i in range(8)]
    plainly: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(short_llama(3), dtype=dtype),
        args=DPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, **plainly),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(LLAMA),
        peft_config=unlock((1, 2)),
    )
    trainer.train()
    model: Any = trainer.model
    base = logits(AutoModelForCausalLM.from_pretrained(short_llama(3), dtype=dtype))
    assert apart(logits(model), base) > 1e-4
    assert all(p.dtype == torch.float32 for g in tensors_of(model).values() for p in g.values())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: unlock(r=4, use_dora=True), "(?s)use_dora=True: LoRA's own.*r=4: LoRA's own"),
        (lambda: unlock({"unit": "head", "layers": 0}), "with method: head alone"),
        (lambda: unlock(target_parameters=["experts.gate_up_proj"]), "LoRA's own"),
        (lambda: unlock().resolve(llama()), "no stock config"),
        (
            lambda: layerpeft.get_peft_model(llama(), LayerHeadConfig(select="last:1")).add_adapter("b", unlock()),
            "takes a model without other adapters",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(make, words):
    with pytest.raises((LayerpeftError, ValueError), match=words):
        make()


@pytest.mark.slow
def test_over_a_base_in_16_bit_small_steps_are_not_lost_and_the_result_has_its_type(tmp_path):
    start: Any = llama()
    start.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    off = logits(base)
    model = layerpeft.get_peft_model(base, unlock(modules_to_save=["norm"]))
    optimizer = adamw(model.train(), lr=1e-3)
    step(model, optimizer, BATCHES[0])  # which checks that every tensor has moved
    copies = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in copies.values()} == {torch.float32} and len(copies) == 2 * 16 + 1
    model.save_pretrained(tmp_path / "adapter")
    want = logits(model)
    assert torch.equal(logits(layerpeft.load(tmp_path / "adapter")), want)
    ways: tuple[dict[str, Any], ...] = ({}, {"model": AutoModelForCausalLM.from_pretrained(tmp_path / "base")})
    for number, whole in enumerate(ways):
        out = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / str(number), **whole))
        assert {p.dtype for p in out.parameters()} == {torch.bfloat16} and apart(logits(out), want) < 0.05
    assert torch.equal(logits(model.unload()), off)
