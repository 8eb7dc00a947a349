"""Trainers of transformers and TRL: what is chosen, what moves, what is clipped."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
)

import layerpeft
from layerpeft import LayerLoraConfig
from layerpeft.errors import ScoreError, TrainingError
from tests.helpers.short import LAYERS, short_llama
from tests.helpers.training import (
    BY_GRADIENT,
    At,
    Seen,
    chosen,
    gsm8k_rows,
    layer_of,
    moved,
    plain,
    record,
    sft,
    snapshot,
)

SELECTS = [BY_GRADIENT, "last:3"]


@pytest.fixture(scope="module")
def rows():
    return gsm8k_rows()


def scored(model, batches, bf16=False, **options):
    """`score_layers` in the number formats that the trainer uses."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return layerpeft.score_layers(model, batches=batches, num_batches=len(batches), progress=False, **options)


@pytest.mark.spread(2)
@pytest.mark.parametrize("select", SELECTS, ids=["gradient_norm", "last"])
def test_sft_with_default_arguments_moves_the_chosen_layers_and_nothing_else(rows, tmp_path, select):
    trainer = sft(rows, tmp_path, LayerLoraConfig(select=select), save_steps=2, bf16=True)  # as by default
    assert trainer.args.gradient_checkpointing and trainer.args.bf16
    before, seen = snapshot(trainer.model), Seen().watch(trainer)
    trainer.train()
    layers = chosen(trainer)
    assert len(layers) == 3
    changed = moved(trainer.model, before)
    assert changed and all(".lora_" in n for n in changed)
    assert {layer_of(n) for n in changed} == set(layers)
    wrapped = [n for n, _ in trainer.model.named_parameters() if "lora_B" in n]
    assert changed >= {plain(n) for n in wrapped}
    assert {layer_of(plain(n)) for n in wrapped} == set(layers)
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    base = load_file(short_llama() / "model.safetensors")
    assert all(torch.equal(p.to(base[n].dtype), base[n]) for n, p in snapshot(trainer.model).items() if n in base)
    if isinstance(select, dict):
        fresh = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=trainer.model.dtype)
        scores = scored(fresh, seen.batches[:1], bf16=True)
        assert layers == sorted(scores.ranked()[:3])
        assert record(trainer).selection.scores.values == pytest.approx(scores.values, rel=5e-3)
    else:
        assert layers == [2, 3, 4]
    assert record(trainer).checks["end"] and record(trainer).steps_trained == dict.fromkeys(layers, 2)
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert {layer_of(n) for n in saved} == set(layers) and len(saved) == 2 * len(wrapped)


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("lengths", ["equal", "ragged"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["default", "reentrant"])
def test_the_choice_is_that_of_score_layers_on_the_micro_batches_of_the_first_step(rows, tmp_path, reentrant, lengths):
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_steps": 1}
    options |= {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, "save_strategy": "no"}
    data = rows
    if lengths == "equal":
        draw = torch.Generator().manual_seed(3)
        data = Dataset.from_dict({"input_ids": torch.randint(5, 4000, (32, 32), generator=draw).tolist()})
    trainer = sft(data, tmp_path, LayerLoraConfig(select=BY_GRADIENT), **options)
    seen = Seen().watch(trainer)
    trainer.train()
    assert len(seen.batches) == 4
    fresh = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=trainer.model.dtype)
    scores = scored(fresh, seen.batches)
    found = record(trainer).selection
    assert found.layers == tuple(sorted(scores.ranked()[:3]))
    assert found.scores.origin["num_batches"] == 4
    assert found.scores.values == pytest.approx(scores.values, rel=5e-3)


@pytest.mark.spread(2)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_first_step_clips_by_the_norm_of_the_chosen_layers_alone(rows, tmp_path, accumulate):
    limit = 1e-3
    options = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 2, "save_strategy": "no"}
    config = LayerLoraConfig(select={**BY_GRADIENT, "keep": 1, "pick": "bottom"})
    trainer = sft(rows, tmp_path, config, max_grad_norm=limit, **options)
    seen, pool, sums = Seen().watch(trainer), {}, []
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, n=name: pool.__setitem__(n, p.grad.clone()))
    trainer.add_callback(At("on_pre_optimizer_step", lambda: sums.append(dict(pool))))
    trainer.train()
    layers = set(chosen(trainer))
    assert {layer_of(plain(n)) for n in sums[0]} == set(range(LAYERS))  # all of the pool got gradients, but
    assert {layer_of(plain(n)) for n in seen.steps_with_gradient[0]} == layers  # what was clipped is the chosen layers'
    of_chosen = torch.stack([g.norm() for n, g in sums[0].items() if layer_of(plain(n)) in layers]).norm()
    of_pool = torch.stack([g.norm() for g in sums[0].values()]).norm()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged[0] == pytest.approx(float(of_chosen), rel=1e-5) and of_pool > 1.2 * of_chosen
    assert seen.norms == pytest.approx([limit, limit], rel=1e-2)  # clipping left the chosen layers the whole limit


def test_where_the_engine_has_no_callback_the_optimizer_hook_chooses(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("layerpeft.integrations.trainer.Variable", object)
    trainer = sft(rows, tmp_path, LayerLoraConfig(select=BY_GRADIENT), max_steps=1, save_strategy="no")
    seen = Seen().watch(trainer)
    trainer.train()
    assert {layer_of(plain(n)) for n in seen.steps_with_gradient[0]} == set(range(LAYERS))
    assert len(chosen(trainer)) == 3 and record(trainer).checks["end"]


def test_batches_on_the_config_choose_as_get_peft_model_does(rows, tmp_path, gsm8k_batches):
    model = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    config = LayerLoraConfig(select=BY_GRADIENT, batches=iter(gsm8k_batches[:3]), task_type="CAUSAL_LM")
    trainer = sft(rows, tmp_path, config, model, max_steps=1, save_strategy="no")
    trainer.train()
    other = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    wrapped = layerpeft.get_peft_model(other, LayerLoraConfig(select=BY_GRADIENT), batches=gsm8k_batches[:3])
    there = wrapped.peft_config["default"]._layerpeft.selection
    assert record(trainer).selection == there and record(trainer).selection.scores.origin["num_batches"] == 3


def test_outliers_are_measured_on_the_first_step_too(rows, tmp_path):
    select = {"by": "outliers", "keep": 2, "M": 5}
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 1}
    trainer = sft(rows, tmp_path, LayerLoraConfig(select=select), save_strategy="no", **options)
    seen = Seen().watch(trainer)
    trainer.train()
    fresh = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=trainer.model.dtype)
    scores = scored(fresh, seen.batches, by="outliers", M=5)
    assert record(trainer).selection.scores.values == pytest.approx(scores.values, rel=1e-3)
    assert chosen(trainer) == sorted(scores.ranked()[:2])


def test_measuring_steps_change_nothing_and_the_schedule_goes_on(rows, tmp_path):
    select = {**BY_GRADIENT, "num_batches": 3}
    trainer = sft(rows, tmp_path, LayerLoraConfig(select=select), max_steps=4, save_strategy="no", weight_decay=0.1)
    before, changed = snapshot(trainer.model), []
    trainer.add_callback(At("on_step_end", lambda: changed.append(moved(trainer.model, before))))
    trainer.train()
    assert changed[0] == changed[1] == set() and changed[2]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([2e-5 * (4 - i) / 4 for i in range(4)])
    assert record(trainer).steps_trained == dict.fromkeys(chosen(trainer), 2)


def test_training_that_ends_before_the_choice_is_an_error_and_keeps_what_there_is(rows, tmp_path):
    trainer = sft(rows, tmp_path, LayerLoraConfig(select={**BY_GRADIENT, "num_batches": 9}), save_strategy="no")
    with pytest.raises(TrainingError, match=r"(?s)before the layers were chosen: 2 of 9 batches.*unverified"):
        trainer.train()
    assert (tmp_path / "unverified" / "adapter_model.safetensors").is_file()


def test_a_choice_that_cannot_be_made_stops_training_with_its_own_error(rows, tmp_path):
    select = {"by": "outliers", "keep": 2, "M": 10000}
    trainer = sft(rows, tmp_path, LayerLoraConfig(select=select), save_strategy="no")
    before = snapshot(trainer.model)
    with pytest.raises(ScoreError, match="is an outlier at M = 10000.*Lower it"):
        trainer.train()
    assert moved(trainer.model, before) == set()


def test_a_loop_with_accelerate(rows, tmp_path, gsm8k_batches):
    model = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    model = layerpeft.get_peft_model(model, LayerLoraConfig(select=BY_GRADIENT, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared, stepper = accelerator.prepare(model, optimizer)
        for batch in gsm8k_batches[:4]:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                stepper.step()
                stepper.zero_grad()
    finally:
        AcceleratorState._reset_state(True)
    layerpeft.check_trained(model)
    fresh = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    scores = layerpeft.score_layers(fresh, batches=gsm8k_batches[:2], num_batches=2, progress=False)
    found = model.peft_config["default"]._layerpeft
    assert found.selection.layers == tuple(sorted(scores.ranked()[:3]))
    assert found.selection.scores.values == pytest.approx(scores.values, rel=1e-4)
    assert found.steps_trained == dict.fromkeys(found.selection.layers, 2)


# transformers' Trainer on a classification model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=100, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def classify(folder, out, config, **options):
    torch.manual_seed(1)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **still)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (32, 8), generator=draw)
    data = [{"input_ids": x.tolist(), "labels": int(x[0]) % 3} for x in ids]
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        **options,
    }
    args = TrainingArguments(str(out), report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True, **options)
    wrapped = layerpeft.get_peft_model(model, config)
    return Trainer(wrapped, args=args, train_dataset=data, eval_dataset=data[:8])


@pytest.mark.matrix
@pytest.mark.parametrize("steps", [1, 3], ids=["", "accumulated"])
@pytest.mark.parametrize("select", [{"by": "gradient_norm", "keep": 2}, "last:1"], ids=["gradient_norm", "last"])
def test_trainer_on_a_classifier_trains_its_head_and_the_chosen_layers(bert, tmp_path, select, steps):
    config = LayerLoraConfig(select=select, target_modules=["query", "value"], r=4)
    trainer = classify(bert, tmp_path, config, gradient_accumulation_steps=steps)
    before, seen = snapshot(trainer.model), Seen().watch(trainer)
    trainer.train()
    changed, layers = moved(trainer.model, before), chosen(trainer)
    heads = {n for n in changed if n.startswith("classifier.modules_to_save")}
    assert {n.rpartition(".")[2] for n in heads} == {"weight", "bias"}
    assert {layer_of(n) for n in changed - heads} == set(layers) and all(".lora_" in n for n in changed - heads)
    if isinstance(select, dict):
        torch.manual_seed(1)
        fresh = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
        scores = layerpeft.score_layers(
            fresh, batches=seen.batches[:steps], num_batches=steps, target_modules=["query", "value"], progress=False
        )
        assert layers == sorted(scores.ranked()[:2])
        assert record(trainer).selection.scores.values == pytest.approx(scores.values, rel=1e-5)


def test_the_best_model_is_loaded_at_the_end(bert, tmp_path):
    config = LayerLoraConfig(select={"by": "gradient_norm", "keep": 2}, target_modules=["query", "value"], r=4)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps"}
    trainer = classify(bert, tmp_path, config, load_best_model_at_end=True, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    saved = load_file(f"{best}/adapter_model.safetensors")
    live = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if ".lora_" in n}
    assert live and all(torch.equal(saved[n], p) for n, p in live.items())
    assert record(trainer).checks["end"] and len(chosen(trainer)) == 2


def test_two_models_in_one_process_keep_their_own_records(bert, tmp_path):
    one = classify(
        bert, tmp_path / "1", LayerLoraConfig(select=[0], target_modules=["query"]), save_strategy="steps", save_steps=3
    )
    two = classify(
        bert, tmp_path / "2", LayerLoraConfig(select=[3], target_modules=["query"]), save_strategy="steps", save_steps=3
    )
    one.train()
    two.train()
    for number, layer in ((1, 0), (2, 3)):
        state = json.loads((tmp_path / str(number) / "checkpoint-3" / "trainer_state.json").read_text())
        kept = state["stateful_callbacks"]["LayerPeftCallback"]["attributes"]["records"]["default"]
        assert kept["selection"]["layers"] == [layer] and kept["steps_trained"] == {str(layer): 3}


def test_a_second_training_of_one_model_is_checked_and_counted_anew(bert, tmp_path):
    trainer = classify(bert, tmp_path, LayerLoraConfig(select=[2], target_modules=["query"]))
    trainer.train()
    trainer.args.learning_rate = 0.0
    trainer.optimizer = trainer.lr_scheduler = None
    with pytest.raises(TrainingError, match="learning rate of zero"):
        trainer.train()
    assert record(trainer).steps_trained == {2: 3}


# TRL's other trainers


@pytest.mark.spread(2)
@pytest.mark.parametrize("select", SELECTS, ids=["gradient_norm", "last"])
def test_dpo(rows, tmp_path, select):
    from trl import DPOConfig, DPOTrainer

    pairs = rows.select(range(16)).map(
        lambda r: {"chosen": r["completion"], "rejected": " no"}, remove_columns="completion"
    )
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "use_cpu": True, "bf16": False}
    args = DPOConfig(str(tmp_path), save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-3, **options)
    trainer = DPOTrainer(str(short_llama()), args=args, train_dataset=pairs, peft_config=LayerLoraConfig(select=select))
    before = snapshot(trainer.model)
    trainer.train()
    changed = moved(trainer.model, before)
    assert {layer_of(n) for n in changed} == set(chosen(trainer)) and all(".lora_" in n for n in changed)
    assert record(trainer).checks["end"] and len(chosen(trainer)) == 3
    if isinstance(select, dict):
        assert record(trainer).selection.scores.origin["num_batches"] == 1


def test_reward(rows, tmp_path):
    from trl import RewardConfig, RewardTrainer

    pairs = rows.select(range(16)).map(
        lambda r: {"chosen": r["completion"], "rejected": " no"}, remove_columns="completion"
    )
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "use_cpu": True, "bf16": False}
    args = RewardConfig(
        str(tmp_path), save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-3, **options
    )
    config = LayerLoraConfig(select=BY_GRADIENT, task_type="SEQ_CLS")
    trainer = RewardTrainer(str(short_llama()), args=args, train_dataset=pairs, peft_config=config)
    before = snapshot(trainer.model)
    trainer.train()
    changed = moved(trainer.model, before)
    heads = {n for n in changed if n.startswith("score.modules_to_save")}
    assert record(trainer).selection.scores.origin["num_batches"] == 1
    assert heads and {layer_of(n) for n in changed - heads} == set(chosen(trainer))
    assert record(trainer).checks["end"] and len(chosen(trainer)) == 3
