"""What was not seen is not said: a choice that nothing measured is an error, and checks that cannot be made stand in the record."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import trainer

import layerpeft
from layerpeft.errors import TrainingError
from layerpeft.training import checks, follower, measuring
from tests.helpers.loops import BY_GRADIENT, adamw, make_batches, record, step, wrap

BATCHES = make_batches()
BLANK = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in BATCHES]
UNIFORM = {"pick": "uniform", "keep": 1, "reselect_steps": 1, "seed": 1}
WAITS = "before the layers were chosen: 0 of 1 batches"
ALL = "every chosen target moved, and no frozen parameter did"


def run(model, batches):
    optimizer = adamw(model, weight_decay=0.0)
    for batch in batches:
        step(model, optimizer, batch)
    layerpeft.check_trained(model)
    return record(model).checks


def test_a_choice_that_nothing_measured_is_an_error_however_the_training_ends(tmp_path, monkeypatch):
    model = wrap(BY_GRADIENT)
    with pytest.raises(TrainingError, match=WAITS):
        layerpeft.check_trained(model)
    # a trainer whose engine runs and steps where nobody hears of it
    (listens,) = [c() for c in trainer.DEFAULT_CALLBACKS if c.__name__ == "LayerPeftCallback"]
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=[])
    for steps, fails in ((0, False), (3, True)):
        state = SimpleNamespace(stateful_callbacks={}, global_step=0, is_world_process_zero=True)
        listens.on_train_begin(args, state, None, model=model)
        state.global_step = steps
        if fails:
            with pytest.raises(TrainingError, match=WAITS):
                listens.on_train_end(args, state, None)
        else:
            listens.on_train_end(args, state, None)
    # several processes, in none of which a batch is seen: no step goes by without an error
    optimizer = adamw(model)
    monkeypatch.setattr(measuring.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(measuring.distributed, "add_up", lambda t: t)
    with pytest.raises(TrainingError, match="has seen no batch with a finite gradient before the first optimizer step"):
        optimizer.step()


def test_what_processes_make_impossible_stands_in_the_record(monkeypatch, caplog):
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr(checks.distributed, "world_size", lambda: 2)
        model = wrap("last:2")
    assert run(model, BATCHES[:2]) == {"wrapped": checks.ALIKE, "first_step": checks.MOVED, "end": ALL, "unmoved": []}
    model = wrap("last:2")
    with monkeypatch.context() as patch:  # gradients are divided
        patch.setattr(checks, "is_stepped_apart", lambda _: True)
        found = run(model, BATCHES[:2])
    assert found == {"not_made": [checks.UNSEEN], "first_step": checks.MOVED, "end": ALL, "unmoved": []}
    model = wrap({"layers": "last:2", "log_gradients": True})
    (mine,) = follower.followers_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(mine.holdings), "is_divided", True)
        mine.begin(None)
    assert record(model).checks["log_gradients"] == follower.SHARED_OUT and follower.SHARED_OUT in caplog.text


def test_what_cannot_be_compared_at_the_end_is_named_and_not_said_to_be_so():
    model = wrap("last:2")
    optimizer = adamw(model, weight_decay=0.0)
    step(model, optimizer, BATCHES[0])
    model.base_model.model.lm_head.to(torch.float64)
    layerpeft.check_trained(model)
    assert record(model).checks["end"] == checks.MOVED
    (said,) = record(model).checks["not_made"]
    assert said.startswith("whether frozen parameters changed since the first update") and "(lm_head.weight)" in said
    for name, p in model.named_parameters():
        if ".3.self_attn.q_proj.lora_" in name or ".2.self_attn.q_proj.lora_" in name:
            p.data = p.data.double()
    layerpeft.check_trained(model)
    found = record(model).checks
    assert found["end"] == "nothing could be compared" and len(found["not_made"]) == 2
    assert "chosen targets moved" in found["not_made"][1] and "q_proj" in found["not_made"][1]


def test_targets_whose_steps_all_had_nothing_to_show_are_named():
    found = run(wrap(UNIFORM), [BATCHES[0], *BLANK[:3]])
    assert found["end"] == "no frozen parameter moved" and found["first_step"] == checks.MOVED
    (said,) = found["not_made"]
    assert "no gradient but zero in any of their steps" in said and "self_attn" in said
