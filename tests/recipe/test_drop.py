"""Recipes that take layers out: what is refused before weights load, and a run from the whole model to the shorter one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import RecipeError, SaveError
from layerpeft.model.layers import find_module
from layerpeft.recipe.compare import compare
from layerpeft.recipe.comparing.arms import parse_arms
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.score import score
from layerpeft.selection.scorers.removal import left_out
from tests.helpers.short import LAYERS, short_llama

IDS = torch.arange(5, 25)[None]


def _loaded(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _settings(*more: str) -> list[str]:
    own = [
        "max_steps=2",
        "max_eval_samples=2",
        "max_train_samples=12",
        "sample_tokens=0",
        "warmup_steps=0",
        "output_dir=out",
    ]
    own += ["save_strategy=steps", "save_steps=1", "per_device_train_batch_size=2", "max_length=96", "layerpeft.r=2"]
    return [f"model_name_or_path={short_llama()}", "layerpeft.select=last:2", *own, *more]


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ("{keep: 6}", "drop: keep: 6 layers are asked for, and there are 5"),
        ("{keep: 100%}", "drop: keep: '100%'"),
        ("{keep: 1, exclude: first:2}", "drop: keep: 1 of 5 layers is 1, and 2 of them may not go"),
        ("{keep: 5}", "drop: keep: 5 of 5 layers is 5, and none would go"),
        ("first:5", "drop: layers: these are all 5 layers; some must stay"),
        ("{layers: 7}", "drop: .*7 is out of range"),
        ("{unit: head, keep: 3}", "drop: unit: head cannot be taken out of a model; there are layer, sublayer"),
        ("{keep: 4, reselect_steps: 3}", "drop: reselect_steps: is of layers that train"),
        ("{keep: {memory: 1GB}}", "drop: keep: a budget is of a step's time or memory"),
        ("{by: removl, keep: 3}", "drop: unknown scorer 'removl'. Did you mean 'removal'"),
        ("{exclude: 0}", "drop: keep: missing"),
        ("{by: none.json, keep: 3}", "by: no file 'none.json'"),
    ],
)
def test_what_cannot_be_dropped_is_refused_before_weights_load(drop, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("quickstart", _settings(f"drop={drop}"), "train")


def test_everything_else_that_is_wrong_is_said_with_it():
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", _settings("drop={keep: 9}", "optim=adamx", "layerpeft.drop=last:1"), "train")
    assert len(caught.value.problems) == 3 and "drop: this belongs at the top level" in str(caught.value)
    with pytest.raises(RecipeError, match="drop: a model is shortened whole, and FSDP2 divides it"):
        load_recipe(
            "quickstart", _settings("drop={keep: 4}", "fsdp=full_shard", "fsdp_config={fsdp_version: 2}"), "train"
        )


def test_what_goes_by_place_is_gone_from_the_model_that_is_checked():
    by_place = load_recipe("quickstart", _settings("drop=last:2"), "plan")
    assert by_place.model.config.num_hidden_layers == LAYERS - 2 and not by_place.notices


@pytest.mark.slow
def test_a_plan_counts_the_shorter_model():
    small = ("max_length=16", "per_device_train_batch_size=1", "columns={text: '{question}'}")
    whole, shorter = (forecast("quickstart", _settings(*more, *small)) for more in ((), ("drop={keep: 60%}",)))
    assert len(shorter.plan.rows) == LAYERS - 2 == len(whole.plan.rows) - 2
    assert shorter.plan.weights < whole.plan.weights and shorter.plan.flops < whole.plan.flops
    assert "as if the layers 3, 4 did" in shorter.recipe.notices[-1]


def test_a_run_goes_from_the_whole_model_to_the_shorter_one(place, monkeypatch):
    settings = _settings("drop={keep: 60%, num_batches: 1, exclude: 0}")
    assert main(["train", "quickstart", *settings]) == 0
    record = json.loads((place / "out/shorter.json").read_text())["dropped"]
    gone = record["layers"]
    assert (
        len(gone) == 2 and 0 not in gone and record["scores"]["by"] == "removal" and record["select"]["keep"] == "60%"
    )
    # the folder of the shorter model, in plain transformers, is the whole one without these layers
    whole, base = _loaded(short_llama()), _loaded(place / "out/shorter")
    assert base.config.num_hidden_layers == LAYERS - 2
    with torch.no_grad(), left_out([find_module(whole, f"model.layers.{i}") for i in gone]):
        assert torch.allclose(base(IDS).logits, whole(IDS).logits, atol=1e-5)
    # the adapter in plain PEFT, and by its own name for the base
    plain = peft.PeftModel.from_pretrained(base, str(place / "out")).eval()
    named = layerpeft.load(place / "out", dtype=torch.float32).eval()
    assert main(["merge", "out", "merged", "--dtype", "float32"]) == 0
    merged = _loaded(place / "merged")
    with torch.no_grad():
        healed = plain(IDS).logits
        with plain.disable_adapter():
            assert not torch.allclose(plain(IDS).logits, healed, atol=1e-4)
        assert torch.equal(named(IDS).logits, healed)
        assert torch.allclose(merged(IDS).logits, healed, atol=1e-5) and merged.config.num_hidden_layers == LAYERS - 2
    assert json.loads((place / "out/layerpeft.json").read_text())["dropped"]["layers"] == gone
    # the card's code, in the folder
    code = (place / "out/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(place / "out")
    told: dict[str, Any] = {}
    exec(code, told)
    with torch.no_grad():
        assert torch.allclose(told["model"].eval().float()(IDS).logits, healed, atol=1e-5)
    monkeypatch.chdir(place)
    # the whole model has other layers under the same numbers
    home = str(short_llama())
    for command in (["export", "out", "--to", "vllm", "--base", home], ["merge", "out", "no", "--base", home]):
        assert main(command) == 2 and not (place / "no").exists()
    with pytest.raises(SaveError, match="3 layers, out of which others were taken .* and this one has 5"):
        layerpeft.load(place / "out", _loaded(short_llama()))


@pytest.mark.slow
def test_a_resumed_run_keeps_its_shorter_model(place, capsys):
    settings = _settings("drop={keep: 60%, num_batches: 1, exclude: 0}")
    assert main(["train", "quickstart", *settings]) == 0
    trained = load_file(place / "out/adapter_model.safetensors")
    (place / "out/shorter/model.safetensors").unlink()
    (place / "out/shorter").rename(place / "away")
    assert main(["train", "quickstart", *settings, "resume_from_checkpoint=out/checkpoint-1"]) == 0
    again = load_file(place / "out/adapter_model.safetensors")
    assert trained.keys() == again.keys() and all(torch.equal(again[k], trained[k]) for k in trained)
    other = [s.replace("60%", "80%") for s in settings]
    assert main(["train", "quickstart", *other, "resume_from_checkpoint=true"]) == 2
    assert "dropped layers another way (keep: '60%' then, '80%' now)" in capsys.readouterr().err
    # a shorter model that was touched is not gone on with, and never written over
    (place / "out/shorter/config.json").write_text("{}")
    assert main(["train", "quickstart", *settings, "resume_from_checkpoint=true"]) == 2
    assert main(["train", "quickstart", *settings, "overwrite_output_dir=true"]) == 2
    assert "is not what the run was trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_parts_are_silenced_and_do_not_train(place):
    settings = _settings("drop={unit: sublayer, layers: [7, 8]}", "layerpeft.select=all", "max_steps=1")
    assert main(["train", "quickstart", *settings]) == 0
    whole, base = _loaded(short_llama()), _loaded(place / "out/shorter")
    there = dict(base.named_parameters())
    silent = {"model.layers.3.mlp.down_proj.weight", "model.layers.4.self_attn.o_proj.weight"}
    for name, parameter in whole.named_parameters():
        assert not there[name].any() if name in silent else torch.equal(there[name], parameter), name
    trained = {
        k.split(".lora_")[0].removeprefix("base_model.model.")
        for k in load_file(place / "out/adapter_model.safetensors")
    }
    assert len(trained) == 7 * LAYERS - 4 - 3
    assert not any(n.startswith(("model.layers.3.mlp", "model.layers.4.self_attn")) for n in trained)


@pytest.mark.slow
def test_score_and_compare_know_what_was_dropped(place):
    said: list[str] = []
    found = score(load_recipe("quickstart", _settings("drop={keep: 4, num_batches: 1}"), "score"), said.append)
    assert found.scores is not None and found.scores.by == "removal" and len(found.layers) == 1
    command = next(line for line in said if "drop=" in line)
    assert "scores.json" in command and "keep: 4" in command
    again = load_recipe("quickstart", _settings("drop={by: out/scores.json, keep: 4}", "output_dir=o2"), "train")
    assert again.model.config.num_hidden_layers == LAYERS - 1
    scored = score(
        load_recipe("quickstart", _settings("drop=0", "layerpeft.select={by: snr, keep: 1}"), "score"), said.append
    )
    assert scored.num_layers == LAYERS - 1
    compared = compare(
        load_recipe("quickstart", _settings("drop=0", "max_steps=1"), "compare"), parse_arms("first"), said.append
    )
    assert compared.num_layers == LAYERS - 1 and not (place / "out/shorter").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["layerpeft.quantize_frozen=nf4", "layerpeft.select=last:1"],
        ["layerpeft.select={by: gradient_norm, keep: 1, reselect_steps: 1, num_batches: 1}"],
        ["layerpeft={method: full, select: last:1}"],
        ["model_init_kwargs={quantization_config: {load_in_4bit: true}}"],
        [f"layerpeft.distill={{teacher: {short_llama()}, kl: 1.0}}"],
    ],
    ids=["packed", "scheduled", "full", "bitsandbytes", "taught"],
)
def test_a_shorter_model_trains_in_every_way(place, more):
    assert main(["train", "quickstart", *_settings("drop={by: depth, pick: bottom, keep: 3}", *more)]) == 0
    record = json.loads((place / "out/shorter.json").read_text())["dropped"]
    assert record["layers"] == [3, 4] and layerpeft.load(place / "out").config.num_hidden_layers == 3
    if "distill" in more[0]:  # each layer learns from the one that it was
        learnt = json.loads((place / "out/layerpeft.json").read_text())["config"]["distill"]["map"]
        assert {int(k): v for k, v in learnt.items()} == {0: 0, 1: 1, 2: 2}
    assert "quantization_config" not in json.loads((place / "out/shorter/config.json").read_text())
