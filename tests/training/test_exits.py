"""Sorted fine-tuning: the loss at several depths, and a plain model of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.errors import ConfigError, RecipeError, TrainingError
from layerpeft.model.layers import base_of, layer_map
from layerpeft.model.shorten import shortened
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.training.exits import at_exit, with_exits, without_exits
from layerpeft.tuners.exits import save_exits
from tests.helpers.models import MODELS, batch, loss_of
from tests.helpers.short import LAYERS, short_llama

IDS = torch.arange(5, 25)[None]


CALM = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "t5": {"dropout_rate": 0.0}}


def _references(name: str, depths: tuple[int, ...]) -> tuple[Any, Any, list[torch.Tensor]]:
    """A model without dropout, a batch, and the losses of what its first layers make by themselves."""
    model = MODELS[name](**CALM.get(name, {}))
    inputs, layers = batch(name, model.eval()), layer_map(model)
    return model.train(), inputs, [shortened(model, layers, range(d))(**inputs).loss for d in depths]


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "bert", "t5", "mixtral"))]
)
def test_the_loss_is_the_mean_over_exits_and_so_is_its_gradient(name):
    model, inputs, losses = _references(name, (1, 2, 3))
    wanted = torch.autograd.grad(sum(losses) / 3, list(model.parameters()), allow_unused=True)
    for reentrant in (None, False):  # with and without checkpointing
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with_exits(model, [3, 1, 2])
        found = model(**inputs).loss
        torch.testing.assert_close(found, sum(losses) / 3)
        for got, want in zip(
            torch.autograd.grad(found, list(model.parameters()), allow_unused=True), wanted, strict=True
        ):
            assert got is want is None or torch.allclose(got, want, atol=1e-6)
    model.eval()
    with torch.no_grad():
        for depth, loss in enumerate(losses[:2], 1):  # each exit by itself; under evaluation the model is as it was
            with at_exit(model, depth):
                torch.testing.assert_close(model(**inputs).loss, loss.detach())
        torch.testing.assert_close(model(**inputs).loss, losses[2].detach())
    without_exits(model)
    torch.testing.assert_close(model.train()(**inputs).loss, losses[2])


def test_exits_that_mean_nothing_are_refused():
    model = MODELS["llama"]()
    for exits, words in (
        ([1, 4], "go from 1 to 3"),
        ([1, "67%"], "add 3"),
        (["200%", 3], "go from 1 to 3"),
        ([3], "before the last"),
        ([], "none are no depths"),
    ):
        with pytest.raises(ConfigError, match=words):
            with_exits(model, exits)
    with_exits(model, [1, 3])
    with pytest.raises(TrainingError, match="no loss"):
        model(input_ids=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant: false"):
        loss_of("llama", model)


def test_trl_trains_the_mean_over_exits(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"input_ids": list(range(5, 25)), "labels": list(range(5, 25))}] * 2)
    model, _, _ = _references("llama", ())
    inputs = {"input_ids": torch.arange(5, 25)[None].repeat(2, 1), "labels": torch.arange(5, 25)[None].repeat(2, 1)}
    layers = layer_map(model)
    wanted = sum(shortened(model, layers, range(d)).train()(**inputs).loss for d in (1, 3)) / 2
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
    }
    arguments = SFTConfig(
        str(tmp_path), bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, learning_rate=1e-2, **options
    )
    tokenizer = tf.AutoTokenizer.from_pretrained(short_llama())
    trainer = SFTTrainer(
        with_exits(model, [1, 3]),
        arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", r=2),
    )
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - float(wanted)) < 1e-4


def test_each_exit_of_a_run_is_a_plain_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"model_name_or_path={short_llama()}", "max_steps=2", "max_eval_samples=2", "max_train_samples=12"]
    settings += [
        "sample_tokens=0",
        "warmup_steps=0",
        "output_dir=out",
        "per_device_train_batch_size=2",
        "max_length=96",
    ]
    settings += ["layerpeft={method: lora, r: 2, select: stride:1, target_modules: all-linear}", f"exits=[2, {LAYERS}]"]
    assert main(["train", "quickstart", *settings]) == 0
    from layerpeft import load

    model = load("out", dtype=torch.float32).eval()
    for depth in (2, LAYERS):
        plain = tf.AutoModelForCausalLM.from_pretrained(Path("out", f"exit-{depth}")).eval()
        assert plain.config.num_hidden_layers == depth
        with torch.no_grad(), at_exit(model, depth):
            assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-5)
        tf.AutoTokenizer.from_pretrained(Path("out", f"exit-{depth}"))
    assert json.loads(Path("out/layerpeft.json").read_text())["selection"]["layers"] == list(range(LAYERS))
    with pytest.raises(RecipeError) as caught:
        wrong = [
            *settings,
            "output_dir=o2",
            "exits=[2, 9]",
            "loss_type=dft",
            "deepspeed={zero_optimization: {stage: 2}}",
        ]
        load_recipe("quickstart", wrong, "train")
    text = str(caught.value)
    assert all(
        words in text
        for words in ("exits: [9] are no depths", "loss_type: ", "exits: the head runs once for every exit")
    )


@pytest.mark.slow
def test_a_plan_counts_the_head_of_every_exit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [
        f"model_name_or_path={short_llama()}",
        "max_length=16",
        "per_device_train_batch_size=1",
        "layerpeft.select=last:1",
    ]
    settings += ["columns={text: '{question}'}", "layerpeft.r=2"]
    plain, several = (forecast("quickstart", [*settings, *more]).plan for more in ((), (f"exits=[1, 2, {LAYERS}]",)))
    config = tf.AutoConfig.from_pretrained(short_llama())
    head = 2 * 15 * config.vocab_size * config.hidden_size  # operations of one pass through it
    assert several.flops - plain.flops >= 2 * head and several.peak_bytes >= plain.peak_bytes


@pytest.mark.slow
def test_a_loop_of_ones_own_trains_and_saves_exits(tmp_path):
    model: Any = tf.AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    config = LayerLoraConfig(select="stride:1", r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = with_exits(get_peft_model(model, config), [2, 3, LAYERS]).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "adapter")
    folders = save_exits(tmp_path / "adapter", [2, 3, LAYERS], tmp_path, dtype=torch.float32)
    wrapped.eval()
    for folder, depth in zip(folders, (2, 3, LAYERS), strict=True):
        plain = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad(), at_exit(base_of(wrapped), depth):
            assert torch.allclose(plain(IDS).logits, wrapped(IDS).logits, atol=1e-5)
