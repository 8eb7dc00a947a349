"""Recipes that store layers in fewer bits: checked before weights load, stored while they load, resumed as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import ConfigError, QuantizationError, RecipeError
from layerpeft.model.layers import base_of, find_module
from layerpeft.model.precisions import KEPT, precision_of, tensor_bytes
from layerpeft.quantization.load import load_quantized
from layerpeft.recipe import trainer
from layerpeft.recipe.measure import measure
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.train import run
from tests.helpers.repeating import repeated
from tests.helpers.short import LAYERS, short_llama

pytestmark = pytest.mark.usefixtures("shallow")

pytest.importorskip("bitsandbytes")
pytest.importorskip("hqq")
TINY = ["max_steps=4", "max_train_samples=16", "max_eval_samples=4", "per_device_train_batch_size=2", "max_length=48"]
TINY += ["sample_tokens=0", "logging_steps=1", "use_cpu=true", "warmup_steps=0", "layerpeft.r=2"]


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stored(model):
    """Layer -> the precisions of its linears."""
    base = base_of(model)
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"]
    return [{precision_of(find_module(base, f"model.layers.{i}.{n}")) for n in names} for i in range(LAYERS)]


def trained(name, *settings):
    """The recipe, run on fewer layers; the model that it trained."""
    held = []
    make = trainer.make_trainer

    def kept(setup, model, **changes):
        held.append(model)
        return make(setup, model, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerpeft.recipe.train.make_trainer", kept)
        result = run(load_recipe(name, [*TINY, f"model_name_or_path={short_llama()}", *settings]), lambda _: None)
    return held[-1], result


@pytest.mark.pictures
def test_a_recipe_trains_in_16_bit_over_a_4_bit_rest_and_says_what_that_takes(capsys):
    model, result = trained("frozen_nf4")
    chosen = {row.layer for row in result.report.rows if row.chosen}
    assert stored(model) == [{KEPT} if i in chosen else {"nf4"} for i in range(LAYERS)] and len(chosen) == 3
    assert result.weight_bytes == tensor_bytes(model) < 8 * 2**20
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}, "TRL casts QLoRA's"
    record = json.loads(Path("outputs/frozen_nf4/layerpeft.json").read_text())
    assert record["config"]["quantize_frozen"] == "nf4" and set(record["quant"]["modules"].values()) == {"nf4", KEPT}
    assert "bits.png" in record["files"] and "layers.png" in record["files"]
    again = layerpeft.load("outputs/frozen_nf4")
    assert stored(again) == stored(model)


SAVED = ["save_strategy=steps", "save_steps=2"]
BUDGET = [*SAVED, "layerpeft.quant.select.num_batches=1"]


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory):
    """A run of `mean_bits`: its folder, with a checkpoint of its middle; its model; what came of it."""
    folder = tmp_path_factory.mktemp("budgeted") / "out"
    return folder, *trained("mean_bits", *BUDGET, f"output_dir={folder}")


def test_a_budget_is_measured_on_the_batches_of_the_recipe(budgeted):
    folder, model, result = budgeted
    record = json.loads((folder / "layerpeft.json").read_text())["quant"]
    kinds = set(record["modules"].values())
    assert len(kinds) > 1 and kinds <= {"hqq2", "hqq3", "nf4", "int8"}
    weights, size = sum(r["weights"] for r in record["rows"]), sum(r["bytes"] for r in record["rows"])
    assert 3.6 < 8 * size / weights < 4.06 and {n for kind in stored(model) for n in kind} == kinds
    assert all(row.change for row in result.report.rows)


@pytest.mark.parametrize("select", ["last:2", repeated("{by: gradient_norm, keep: 2, num_batches: 1}")])
def test_what_the_architecture_decides_is_stored_while_it_loads(monkeypatch, select):
    asked = []
    load = load_quantized
    monkeypatch.setattr(trainer, "load_quantized", lambda *a, **k: asked.append(a[1]) or load(*a, **k))
    model, _ = trained("frozen_nf4", f"layerpeft.select={select}")
    early = select == "last:2"
    assert [len(a) for a in asked] == ([7 * (LAYERS - 2)] if early else [])
    assert sum(kind == {"nf4"} for kind in stored(model)) == LAYERS - 2


def test_a_base_that_was_saved_in_mixed_precision_is_trained_as_it_is():
    model = layerpeft.load_model(short_llama(), {"select": "first:3", "bits": 2, "rest": "nf4"}, dtype=torch.bfloat16)
    layerpeft.save_model(model, "base")
    AutoTokenizer.from_pretrained(short_llama()).save_pretrained("base")
    whole = layerpeft.load_model("base")
    assert stored(whole) == stored(model) == [{"hqq2"}] * 3 + [{"nf4"}] * (LAYERS - 3)
    with pytest.raises(QuantizationError, match="is hqq2 already, and asked for as int8"):
        layerpeft.load_model("base", {"bits": 8})
    trained_model, _ = trained("frozen_nf4", "model_name_or_path=base", "layerpeft.quantize_frozen=null", "dtype=null")
    assert stored(trained_model) == stored(model)
    assert stored(layerpeft.load("outputs/frozen_nf4")) == stored(layerpeft.load("base")) == stored(model)
    with pytest.raises(ConfigError, match="was not written by save_model: say how"):
        layerpeft.load_model(short_llama())


def test_a_run_that_is_resumed_keeps_its_precisions(budgeted, tmp_path):
    folder, whole, _ = budgeted
    shutil.copytree(folder / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    # what the budget is measured on may change: the choice was made
    more = [*BUDGET, "output_dir=b", "resume_from_checkpoint=true", "lr_scheduler_type=linear"]
    again, _ = trained("mean_bits", *more)
    assert stored(whole) == stored(again)
    other = ["layerpeft.select=all", "layerpeft.quantize_frozen=null", "layerpeft.quantize_trained=int8"]
    with pytest.raises(
        RecipeError, match="stored its layers in other precisions.*quantize_trained: None then, 'int8' now"
    ):
        trained("frozen_nf4", *SAVED, "output_dir=b", "resume_from_checkpoint=true", *other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["layerpeft.quantize_frozen=nf5"], ["quantize_frozen", "'nf5'", "Did you mean 'nf4'"]),
        (
            ["layerpeft.quant={bitz: 4}", "layerpeft.quantize_frozen=null"],
            ["unknown key 'bitz'", "did you mean 'bits'"],
        ),
        (["layerpeft.quant={bits: 4}"], ["two ways to say the same"]),
        (["layerpeft.select=all"], [f"all {LAYERS} layers train", "quantize_trained='nf4'"]),
        (["model_init_kwargs={quantization_config: {load_in_4bit: true}}"], ["quantizes the whole model already"]),
        (["layerpeft.select={pick: uniform, keep: 2, reselect_steps: 2}"], ["needs its original 16-bit weights"]),
        (["layerpeft.quantize_frozen=null", "layerpeft.quant={mean_bits: 1.2}"], ["cheapest choice"]),
        (["layerpeft.quantize_frozen=null", "layerpeft.quant={bits: 4, skip_modules: [k_proj]}"], ["need equal bits"]),
    ],
)
def test_what_cannot_be_is_said_before_weights_load(settings, words, monkeypatch):
    monkeypatch.setattr(trainer, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(RecipeError) as caught:
        load_recipe("frozen_nf4", [*TINY, *settings])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_plan_states_bits_bytes_and_the_peak_of_loading(capsys):
    assert main(["plan", "frozen_nf4", "layerpeft.select=last:2"]) == 0
    text = capsys.readouterr().out
    assert "nf4 where nothing trains (21 linears)" in text and "already peaks at" in text


@pytest.mark.slow  # as tests/recipe/test_measure.py has it in four bits
def test_a_plan_of_weights_is_what_a_step_holds():
    found = measure("frozen_nf4", [*TINY[1:], "layerpeft.select=last:2", f"model_name_or_path={short_llama()}"])
    weights = next(part for part in found.parts if part.name == "weights")
    assert weights.measured == pytest.approx(weights.predicted, rel=0.02)


@pytest.mark.slow  # tests/test_cli.py compares arms, and others here train over packed layers
def test_arms_are_compared_over_packed_layers_and_the_one_with_all_of_them_stays_in_16_bit():
    settings = [*TINY, "max_steps=2", "layerpeft.select.num_batches=1", "output_dir=compared"]
    settings.append(f"model_name_or_path={short_llama()}")
    assert main(["compare", "frozen_nf4", *settings, "--arms", "random:1,last,all"]) == 0
    found = json.loads(Path("compared/compare.json").read_text())
    runs = {run["arm"]: run for run in found["runs"]}
    assert len(runs["all"]["layers"]) == LAYERS and {"last", "all"} < set(runs)
    assert 3 * runs["all"]["trainable"] == LAYERS * runs["last"]["trainable"]
