"""The plan of full training against the real thing; and recipes that say `method: full`."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.planning.fit import fit
from layerpeft.planning.plan import plan
from layerpeft.planning.trace import Step, trace
from layerpeft.recipe.read import load_recipe
from tests.helpers.fulling import wrap
from tests.helpers.models import MODELS
from tests.helpers.repeating import some
from tests.helpers.short import short_llama

pytestmark = pytest.mark.usefixtures("shallow")

NAMES = ["llama", "gpt2", "qwen3", "gemma2", "phi3", "mixtral", "gpt_oss"]
LAYERS = 3


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", some(NAMES, ["llama", "gpt_oss"]))
def test_the_plan_predicts_what_is_measured(name):
    model = MODELS[name]()
    config = LayerFullConfig(select="last:1")
    found = plan(model, config, batch_size=2, length=32)
    real = get_peft_model(model, config).train()
    kept = trace(real, 2, 32)
    real.get_base_model().activation_checkpointing_enable()
    recomputed = trace(real, 2, 32)
    ids = torch.randint(0, 64, (2, 32))
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad])
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    optimizer.step()
    states = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    weights = sum(t.nbytes for t in [*real.parameters(), *real.buffers()])
    assert found.parts["weights"] == pytest.approx(weights, rel=0.02)
    assert found.parts["gradients"] == pytest.approx(gradients, rel=0.02)
    assert found.parts["optimizer"] == pytest.approx(states, rel=0.02)
    assert found.kept.peak == pytest.approx(kept.peak, rel=0.15)
    assert found.recomputed.peak == pytest.approx(recomputed.peak, rel=0.15)
    assert found.kept.flops == pytest.approx(kept.flops, rel=0.02)
    assert found.recomputed.flops == pytest.approx(recomputed.flops, rel=0.02)
    assert found.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in real.parameters())
    assert found.stop.layer == len(found.rows) - 1 and [r.trains for r in found.rows] == [False, False, True]
    block = real.get_base_model().get_submodule(found.rows[-1].name)
    assert found.rows[-1].weight_bytes == sum(p.nbytes for p in block.parameters())
    assert found.rows[-1].trainable == found.trainable
    assert "original weights" in str(found) and found.flops < found.flops_full


def test_masters_and_their_states_are_counted():
    model = AutoModelForCausalLM.from_pretrained(short_llama(2), dtype=torch.bfloat16)
    plans = [
        plan(model, LayerFullConfig(select="last:1", master_weights=m), batch_size=1, length=16) for m in (False, True)
    ]
    count = plans[0].trainable
    assert plans[0].gradients == 2 * count and plans[1].gradients == 6 * count
    assert plans[0].states == 4 * count and plans[1].states == 8 * count
    assert plans[1].weights - plans[0].weights == 4 * count


TURNS = {"pick": "uniform", "keep": 2, "reselect_steps": 5}


@pytest.mark.parametrize("kind", some([LayerFullConfig, LayerLoraConfig, LayerGaloreConfig], 1))
def test_a_schedule_is_planned_with_what_trains_at_a_time(kind):
    options = {} if kind is LayerFullConfig else {"r": 4}
    turn = plan(short_llama(LAYERS), kind(select=TURNS, **options), batch_size=1, length=16)
    two = plan(short_llama(LAYERS), kind(select="first:2", **options), batch_size=1, length=16)
    all_ = plan(short_llama(LAYERS), kind(select=f"0-{LAYERS - 1}", **options), batch_size=1, length=16)
    keep = plan(short_llama(LAYERS), kind(select={**TURNS, "state": "keep"}, **options), batch_size=1, length=16)
    warm = plan(short_llama(LAYERS), kind(select={**TURNS, "warmup_steps": 3}, **options), batch_size=1, length=16)
    assert turn.trainable == two.trainable and turn.gradients == two.gradients and turn.states == two.states
    assert keep.states == all_.states and keep.gradients == two.gradients
    assert warm.gradients == all_.gradients and warm.states == all_.states
    assert turn.flops == pytest.approx(two.flops, rel=0.02)
    assert f"2 of {LAYERS} layers train at a time" in str(turn) and "taken to the CPU" in str(turn)
    assert sum(r.trains for r in turn.rows) == 2


def test_always_on_modules_run_the_backward_pass_to_the_bottom():
    found = plan(
        short_llama(LAYERS), LayerFullConfig(select="last:1", modules_to_save=["embed_tokens"]), batch_size=1, length=16
    )
    plain = plan(short_llama(LAYERS), LayerFullConfig(select="last:1"), batch_size=1, length=16)
    assert found.stop.layer is None and "below the layers" in found.stop.why
    assert found.trainable > plain.trainable and found.weights == plain.weights and found.flops > plain.flops


@pytest.mark.slow  # as in tests/planning/test_fit.py
def test_fewer_layers_are_given_up_to_fit():
    config = LayerFullConfig(select=f"last:{LAYERS}")
    whole = plan(short_llama(LAYERS), config, batch_size=2, length=64, checkpointing=True).peak_bytes
    options = {"batch_size": 2, "length": 64, "optimizer": "adamw_torch", "checkpointing": True, "step": Step()}
    found = fit(short_llama(LAYERS), config, f"{whole * 0.75 / 2**20:.1f}MB", **options)
    assert found.plan.peak_bytes < whole and found.gave_up


# recipes

RECIPE = """
trainer: sft
model_name_or_path: layerpeft://llama-6m
dataset_name: layerpeft://gsm8k_train.jsonl
eval_dataset: layerpeft://gsm8k_eval.jsonl
columns: {{prompt: "{{question}}", completion: "{{answer}}"}}
output_dir: {out}
layerpeft: {block}
max_steps: 2
max_train_samples: 16
max_eval_samples: 4
per_device_train_batch_size: 2
max_length: 48
sample_tokens: 0
use_cpu: true
bf16: false
report_to: none
"""


def recipe(folder, block):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "out", block=block))
    return str(path)


def test_a_recipe_trains_reports_merges_and_loads(tmp_path, capsys):
    block = "{method: full, select: {by: gradient_norm, keep: 2, num_batches: 1}, exclude_modules: [input_layernorm]}"
    path, base = recipe(tmp_path, block), str(short_llama(LAYERS))
    for command in ("plan", "train"):
        assert main([command, path, f"model_name_or_path={base}"]) == 0
    said = capsys.readouterr().out
    assert "trainable params" in said and "layerpeft merge" in said
    written = json.loads((tmp_path / "out" / "layerpeft.json").read_text())
    assert written["method"] == "full" and len(written["selection"]["layers"]) == 2
    assert not any("input_layernorm" in t for t in written["selection"]["targets"])
    changed = [row for row in written["report"] if row["change"]]
    assert [row["layer"] for row in changed] == written["selection"]["layers"]
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "merged"), "--base", base]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded = layerpeft.load(tmp_path / "out", AutoModelForCausalLM.from_pretrained(base)).merge_and_unload()
    assert all(torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in merged.named_parameters())


def test_a_recipe_scores_as_it_would_train(tmp_path, capsys):
    path = recipe(tmp_path, "{method: full, select: {by: outliers, keep: 2, num_batches: 1}}")
    assert main(["score", path, f"model_name_or_path={short_llama(LAYERS)}"]) == 0
    assert f"2 of {LAYERS} layers, by outliers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ("{method: full, select: last:2, target_modules: [nrom]}", "'nrom' matches nothing in the layers"),
        ("{method: full, select: last:2, exclude_modules: [mlpp]}", "'mlpp' matches nothing in the layers"),
        ("{method: full, select: last:2, modules_to_save: [lm_haed]}", "Did you mean 'lm_head'?"),
        ("{method: full, select: all, target_modules: [nrom]}", "'nrom' matches nothing in the layers"),
        ("{method: full, select: last:2, lora_dropout: 0.1}", "lora_dropout=0.1: LoRA's own"),
        ("{method: full, select: last:2, master_weights: 2}", "master_weights: expected true or false"),
        ("{method: full, select: last:20}", "asks for 20 layers of 5"),
        ("{method: lora, select: last:2, master_weights: true}", "belongs to method: full"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_before_weights_are_loaded(block, wanted, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, block))
    assert wanted in str(caught.value) and "line 8" in str(caught.value)


def test_the_head_may_train_in_a_recipe_because_it_trains_in_place(tmp_path):
    found = load_recipe(recipe(tmp_path, "{method: full, select: last:2, modules_to_save: [lm_head]}"))
    assert found.method == "full"
    assert "lm_head.weight" in {
        n.replace("modules_to_save.default.", "")[17:]
        for n, p in wrap(modules_to_save=["lm_head"]).named_parameters()
        if p.requires_grad
    }
