"""A resumed run keeps its choice, equals the unbroken one, and refuses another choice."""

from __future__ import annotations

import os

import pytest
import torch

from layerpeft import LayerLoraConfig
from layerpeft.errors import SelectionError
from tests.helpers.short import LAYERS
from tests.helpers.training import BY_GRADIENT, chosen, gsm8k_rows, record, sft


@pytest.fixture(scope="module")
def rows():
    return gsm8k_rows()


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".lora_" in n}


def resumable(rows, folder, select=BY_GRADIENT, **options):
    options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **options}
    return sft(rows, folder, LayerLoraConfig(select=select, lora_dropout=0.1), **options)


@pytest.fixture(scope="module")
def unbroken(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    torch.manual_seed(0)
    trainer = resumable(rows, folder)
    trainer.train()
    return trainer, folder


def test_a_resumed_run_equals_the_unbroken_one_to_the_bit(unbroken, rows, tmp_path):
    whole, folder = unbroken
    torch.manual_seed(5)
    trainer = resumable(rows, tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    ours, theirs = adapter(trainer), adapter(whole)
    assert set(ours) == set(theirs) and all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert chosen(trainer) == chosen(whole)
    assert record(trainer).selection == record(whole).selection  # scores and why included
    assert record(trainer).steps_trained == record(whole).steps_trained == dict.fromkeys(chosen(whole), 6)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e][-3:] for t in (trainer, whole)]
    assert losses[0] == losses[1]


def test_resume_refuses_another_choice(unbroken, rows, tmp_path):
    whole, folder = unbroken
    others = [i for i in range(LAYERS) if i not in chosen(whole)][:3]
    trainer = resumable(rows, tmp_path, select=others)
    with pytest.raises(SelectionError, match="trains other targets than this model") as error:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert f"layers.{others[0]}." in str(error.value) and "layers.json" not in str(error.value)
    assert "layerpeft.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "select, says",
    [
        ({**BY_GRADIENT, "keep": 4}, "keep: 3 then, 4 now"),
        ({"by": "outliers", "keep": 3, "M": 5}, "by: 'gradient_norm' then, 'outliers' now"),
        ({**BY_GRADIENT, "seed": 1}, "seed: 0 then, 1 now"),
    ],
)
def test_resume_refuses_another_way_to_choose(unbroken, rows, tmp_path, select, says):
    trainer = resumable(rows, tmp_path, select=select)
    with pytest.raises(SelectionError, match="chose its layers in another way") as error:
        trainer.train(resume_from_checkpoint=str(unbroken[1] / "checkpoint-3"))
    assert says in str(error.value)


def test_resume_takes_the_layers_of_the_record_as_a_list(unbroken, rows, tmp_path):
    whole, folder = unbroken
    trainer = resumable(rows, tmp_path, select=tuple(chosen(whole)), max_steps=4)
    state = folder / "checkpoint-3" / "trainer_state.json"
    text = state.read_text()
    try:
        state.write_text(text.replace("LayerPeftCallback", "Another"))  # a run that kept no record in its state
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    finally:
        state.write_text(text)
    assert chosen(trainer) == chosen(whole) and record(trainer).steps_trained == dict.fromkeys(chosen(whole), 1)


@pytest.mark.spread(2)
@pytest.mark.parametrize("callbacks", [False, True])
def test_a_tuple_of_layers_is_the_same_choice_after_json(rows, tmp_path, callbacks):
    options = {"max_steps": 2, "save_steps": 1, "restore_callback_states_from_checkpoint": callbacks}
    resumable(rows, tmp_path, select={"layers": (1, 3)}, **options).train()
    trainer = resumable(rows, tmp_path, select={"layers": (1, 3)}, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert record(trainer).steps_trained == {1: 2, 3: 2} and os.path.isdir(tmp_path / "checkpoint-2")
