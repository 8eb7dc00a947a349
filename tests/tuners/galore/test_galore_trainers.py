"""Projection through Trainer and TRL: it trains, saves, resumes in the middle of a period, and loads its best checkpoint."""

from __future__ import annotations

import json
import shutil
from functools import cache

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.errors import ConfigError, LayerpeftError
from layerpeft.tuners.galore.projection import fixed_of, state_of, trained_of
from tests.helpers.loops import adamw, llama, make_batches
from tests.helpers.projecting import (
    apart,
    close,
    logits,
    modules,
    refreshes,
    same,
    snapshot,
    train,
    trained,
    weights,
    wrap,
)
from tests.helpers.repeating import some
from tests.helpers.short import short_llama
from tests.helpers.training import BY_GRADIENT, chosen, gsm8k_rows, layer_of, moved, record, sft
from tests.helpers.training import snapshot as plain_snapshot

STEPS = 10


@pytest.fixture(scope="module")
def rows():
    return gsm8k_rows()


def sequences(unequal=False):
    """Twenty-four rows of twelve tokens, or of four to twelve and padding."""
    draw = torch.Generator().manual_seed(11)
    found = []
    for number in range(24):
        ids = torch.randint(1, 64, (12,), generator=draw)
        length = 4 + number % 9 if unequal else 12
        mask = (torch.arange(12) < length).long()
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def make_trainer(folder, model=None, data=None, **options):
    given = {
        "max_steps": STEPS,
        "save_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    model = wrap(update_proj_gap=4) if model is None else model
    data = sequences(True) if data is None else data
    return Trainer(model, TrainingArguments(str(folder), **given), train_dataset=data, eval_dataset=data[:4])


def outcome(trainer):
    """Everything that a run has come to."""
    states = trainer.optimizer.state_dict()["state"]
    moments = {f"{i}|{k}": torch.as_tensor(v) for i, s in states.items() for k, v in s.items()}
    losses = [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    return snapshot(trainer.model) | moments, losses


# TRL


CONFIG = {"r": 4, "update_proj_gap": 3, "target_modules": ["q_proj", "down_proj"]}
SELECTS = {"gradient_norm": BY_GRADIENT, "last": "last:3"}


@pytest.mark.parametrize("select", some(SELECTS, 1))
def test_sft(rows, tmp_path, select):
    config = LayerGaloreConfig(select=SELECTS[select], **CONFIG)
    options = {"max_steps": 7, "save_steps": 7, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "bf16": False}
    trainer = sft(rows, tmp_path, config, **options)
    before = plain_snapshot(trainer.model)
    trainer.train()
    layers = chosen(trainer)
    assert len(layers) == 3 and (select == "gradient_norm" or layers == [2, 3, 4])
    changed = moved(trainer.model, before)
    assert {layer_of(n) for n in changed} == set(layers)
    bases = {n for n in changed if ".lora_" not in n}
    assert {n.removesuffix(".weight") for n in bases} == set(modules(trainer.model))
    assert {(failed, s) for _, failed, s in refreshes(trainer.model)} == {(0, 7)}
    assert all(r >= 2 for r, _, _ in refreshes(trainer.model))
    assert record(trainer).steps_trained == dict.fromkeys(layers, 7) and record(trainer).checks["end"]
    base = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    folder = tmp_path / "checkpoint-7"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(base))
    assert close(logits(peft.PeftModel.from_pretrained(base, folder)), logits(trainer.model))
    twin = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    assert not close(logits(trainer.model), logits(twin), 1e-2)


def pairs(rows):
    found = rows.select(range(16))
    return found.map(lambda r: {"chosen": r["completion"], "rejected": " no"}, remove_columns="completion")


def dpo(rows, folder, model, precompute=False, **options):
    from trl import DPOConfig, DPOTrainer

    given = {"max_steps": 5, "per_device_train_batch_size": 2, "max_length": 48, "use_cpu": True, "bf16": False}
    given["precompute_ref_log_probs"] = precompute
    args = DPOConfig(
        str(folder), save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2, logging_steps=1, **given
    )
    tokenizer = AutoTokenizer.from_pretrained(short_llama())
    return DPOTrainer(model, args=args, train_dataset=pairs(rows), processing_class=tokenizer, **options)


def test_dpo_takes_the_base_for_its_reference(rows, tmp_path):
    references = []
    for precomputed in (False, True):
        config = LayerGaloreConfig(select="last:2", **CONFIG, subspace="random")
        trainer = dpo(rows, tmp_path, str(short_llama(3)), precomputed, peft_config=config)
        seen, original = [], trainer.model.disable_adapter
        if not precomputed:  # else the reference was taken before anything was trained
            trainer.model.disable_adapter = lambda seen=seen, original=original: (seen.append(1), original())[1]
        trainer.train()
        assert len(seen) == (0 if precomputed else 5)
        assert all(r >= 2 for r, _, _ in refreshes(trainer.model)) and record(trainer).checks["end"]
        history = trainer.state.log_history
        references.append([(e["loss"], e["rewards/chosen"], e["grad_norm"]) for e in history if "loss" in e])
    assert len(references[0]) == 5 and references[0][-1][1] != 0
    for ours, theirs in zip(*references, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_dpo_with_the_base_on_the_cpu_stops_with_the_cure(rows, tmp_path):
    config = LayerGaloreConfig(select="last:2", fold="base", **CONFIG)
    with pytest.raises(ConfigError, match="use fold='beside'"):
        dpo(rows, tmp_path, str(short_llama(3)), peft_config=config).train()


def test_a_model_that_was_trained_before_is_its_own_reference(rows, tmp_path):
    from trl.trainer.utils import use_adapter

    model = train(wrap(AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)))
    live = logits(model)
    try:
        trainer = dpo(rows, tmp_path, model.train())
    except LayerpeftError:
        assert torch.equal(logits(model), live)
        return
    with use_adapter(trainer.model, "ref"):
        assert close(logits(trainer.model), live)


def test_an_adapter_that_trl_makes_short_over_four_bits():
    """What TRL does to the trainable tensors of a quantized model, and its autocast; over enough folds to add them up."""
    model = wrap()
    for p in trained(model):
        p.data = p.data.to(torch.bfloat16)
    optimizer = adamw(model, 3e-2)
    for number in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**make_batches()[number % 8]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(state_of(layer).folds.dense is not None for layer in modules(model).values())
    assert {fixed_of(layer).dtype for layer in modules(model).values()} == {torch.float32}
    assert {trained_of(layer).dtype for layer in modules(model).values()} == {torch.bfloat16}


# Trainer: resume


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Kind -> (outcome, folder); the first refresh is at step 1, the checkpoint in the middle of periods."""

    @cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        trainer = make_trainer(folder, wrap(update_proj_gap=4, subspace=kind, moments="project"))
        trainer.train()
        return outcome(trainer), folder

    return run


@pytest.mark.parametrize("kind", some(["sketch", "svd", "random"], 1))
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(unbroken, tmp_path, kind):
    (whole, losses), folder = unbroken(kind)
    torch.manual_seed(5)
    trainer = make_trainer(tmp_path, wrap(update_proj_gap=4, subspace=kind, moments="project"))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))  # outside of its own folder
    ours, again = outcome(trainer)
    due = [state_of(layer).due - 5 for layer in modules(trainer.model).values()]
    assert len(set(due)) > 1 and same(ours, whole)
    assert again[-5:] == losses[-5:] and len(losses) == STEPS
    assert record(trainer).steps_trained == {1: STEPS - 1, 3: STEPS - 1}  # the first has a learning rate of zero
    last = tmp_path / "checkpoint-10"
    assert close(logits(peft.PeftModel.from_pretrained(llama(), last)), logits(trainer.model))
    assert (last / "layerpeft_state.safetensors").read_bytes() == (
        folder / "checkpoint-10" / "layerpeft_state.safetensors"
    ).read_bytes()


def test_resume_from_its_own_folder_with_a_limit_on_checkpoints(unbroken, tmp_path):
    options = {"save_steps": 2, "save_total_limit": 1}
    make_trainer(tmp_path, wrap(update_proj_gap=4, moments="project"), max_steps=6, **options).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    trainer = make_trainer(tmp_path, wrap(update_proj_gap=4, moments="project"), **options)
    trainer.train(resume_from_checkpoint=True)
    # another number of steps is another schedule
    assert len(outcome(trainer)[1]) == STEPS and all(s == STEPS for _, _, s in refreshes(trainer.model))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.parametrize("damage", ["state", "stock"])
def test_resume_refuses_what_it_cannot_go_on_from(unbroken, tmp_path, damage):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(unbroken("sketch")[1] / "checkpoint-5", folder)
    if damage == "state":
        data = bytearray((folder / "layerpeft_state.safetensors").read_bytes())
        data[-1] ^= 64
        (folder / "layerpeft_state.safetensors").write_bytes(bytes(data))
    else:
        (folder / "layerpeft_state.safetensors").unlink()
    trainer = make_trainer(tmp_path / "out", wrap(update_proj_gap=4, moments="project"))
    with pytest.raises(LayerpeftError, match="layerpeft_state.safetensors"):
        trainer.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    "change", [{"scale": 1.0}, {"update_proj_gap": 7}, {"subspace": "random"}, {"moments": "keep"}]
)
def test_resume_refuses_another_projection(unbroken, tmp_path, change):
    options = {"update_proj_gap": 4, "moments": "project", **change}
    trainer = make_trainer(tmp_path, wrap(**options))
    with pytest.raises(LayerpeftError, match=next(iter(change))):
        trainer.train(resume_from_checkpoint=str(unbroken("sketch")[1] / "checkpoint-5"))


@pytest.mark.spread(2)
@pytest.mark.parametrize("fold", ["beside", "base"])
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, fold):
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "save_total_limit": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    torch.manual_seed(0)
    data = sequences()
    for row in data[:4]:  # what is held out is learned, so that the highest loss is the first
        row["labels"] = row["input_ids"]
    trainer = make_trainer(
        tmp_path, wrap(update_proj_gap=2, fold=fold), data[:4], max_steps=9, **{**options, **best, "warmup_steps": 0}
    )
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    first = tmp_path / "checkpoint-3"
    assert losses[0] == max(losses) > losses[-1] and trainer.state.best_model_checkpoint == str(first)
    assert all(s == 3 for _, _, s in refreshes(trainer.model))  # it was nine
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
    loaded = peft.PeftModel.from_pretrained(llama(), first)
    assert close(logits(loaded), logits(trainer.model))
    trainer.save_model(str(tmp_path / "final"))
    assert close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "final")), logits(loaded), 1e-6)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(llama()))


# Trainer: accumulation


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, None), (torch.float32, 1e-2)])
def test_accumulation_equals_larger_batches_whatever_their_lengths(tmp_path, unequal, dtype, most):
    found = []
    for size, parts in ((8, 1), (2, 4)):
        model = wrap(llama().to(dtype), update_proj_gap=4)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "save_strategy": "no"}
        trainer = make_trainer(tmp_path, model, sequences(unequal), max_steps=8, **options)
        trainer.train()
        found.append((weights(trainer.model), refreshes(trainer.model)))
    (whole, counts), (accumulated, again) = found
    start = {n: p.detach() for n, p in llama().to(dtype).named_parameters()}
    movement, difference = apart(whole, start), apart(accumulated, whole)
    print(f"{difference:.1e} apart, {difference / movement:.1e} of the movement")
    assert counts == again and movement > 5e-3
    assert difference <= (1e-7 if most is None else most * movement)


def test_a_report_after_training_says_what_moved(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    rows = layerpeft.layer_report(trainer.model).rows
    assert [r.chosen for r in rows] == [False, True, False, True]
    for row in (rows[1], rows[3]):
        inside = {n: layer for n, layer in modules(trainer.model).items() if f".layers.{row.layer}." in n}
        merged, start = weights(trainer.model), dict(llama().named_parameters())
        change = sum(float((merged[f"{n}.weight"] - start[f"{n}.weight"]).square().sum().detach()) for n in inside)
        size = sum(float(start[f"{n}.weight"].square().sum()) for n in inside)
        assert row.change == pytest.approx((change / size) ** 0.5, rel=1e-3)
