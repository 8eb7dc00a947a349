"""Float32 masters of 16-bit weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerpeft.errors import SaveError
from layerpeft.tuners.full.masters import Masters

GRADIENTS = [torch.randn(6, 5, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(12)]
MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
}


def start(dtype=torch.bfloat16):
    return nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(99)).to(dtype))


def steps(parameter, optimizer, masters, numbers):
    for number in numbers:
        parameter.grad = GRADIENTS[number].clone()
        masters.before_step({"x": parameter})
        optimizer.step()
        masters.after_step()
        assert parameter.dtype == torch.bfloat16 and parameter.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MAKERS)
def test_steps_are_those_of_a_float32_run_that_rounds_for_the_forward_pass(kind):
    low, whole, masters = start(), nn.Parameter(start().detach().float()), Masters()
    ours, theirs = MAKERS[kind]([low]), MAKERS[kind]([whole])
    plain = start()
    alone = MAKERS[kind]([plain])
    for number in range(12):
        steps(low, ours, masters, [number])
        whole.grad = GRADIENTS[number].float()
        theirs.step()
        plain.grad = GRADIENTS[number].clone()
        alone.step()
        assert torch.equal(low.detach(), whole.detach().bfloat16())
    assert torch.equal(masters.copies["x"], whole.detach())
    assert not torch.equal(low.detach(), plain.detach())  # without masters updates are lost in rounding


def test_the_weight_keeps_its_storage_and_gradients_come_back():
    low, masters = start(), Masters()
    place, optimizer = low.data_ptr(), MAKERS["adamw"]([low])
    steps(low, optimizer, masters, [0])
    assert low.data_ptr() == place and torch.equal(low.grad, GRADIENTS[0])
    assert all(v.dtype == torch.float32 for v in optimizer.state[low].values())


def test_a_master_that_is_ahead_of_its_weight_is_told():
    low, masters = nn.Parameter(torch.ones(4).bfloat16()), Masters()
    assert masters.ahead({"x": low}) == set()
    optimizer = torch.optim.SGD([low], 1e-4)
    low.grad = torch.ones(4).bfloat16()
    masters.before_step({"x": low})
    optimizer.step()
    masters.after_step()
    assert torch.equal(low.detach(), torch.ones(4).bfloat16()) and masters.ahead({"x": low}) == {"x"}


def test_what_has_no_gradient_or_is_whole_is_left_alone():
    idle, whole, masters = start(), start(torch.float32), Masters()
    whole.grad = torch.ones(6, 5)
    masters.before_step({"idle": idle, "whole": whole})
    assert idle.dtype == torch.bfloat16 and not masters.copies
    masters.after_step()
    assert torch.equal(whole.grad, torch.ones(6, 5))


def test_weights_that_were_loaded_meanwhile_get_new_masters():
    low, masters = start(), Masters()
    optimizer = torch.optim.SGD([low], 1e-3)
    steps(low, optimizer, masters, [0])
    loaded = torch.full((6, 5), 3.0).bfloat16()
    low.data.copy_(loaded)
    steps(low, optimizer, masters, [1])
    assert torch.equal(masters.copies["x"], loaded.float() - 1e-3 * GRADIENTS[1].float())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(kind):
    low, masters = start(), Masters()
    optimizer = MAKERS[kind]([low])
    steps(low, optimizer, masters, range(6))
    saved = {k: t.clone() for k, t in masters.tensors({"x": low}, [optimizer]).items()}
    weights, states = low.detach().clone(), copy.deepcopy(optimizer.state_dict())
    steps(low, optimizer, masters, range(6, 12))
    again, after = nn.Parameter(weights), Masters()
    resumed = MAKERS[kind]([again])
    resumed.load_state_dict(states)
    after.restore(saved, {"x": again}, [resumed])
    steps(again, resumed, after, range(6, 12))
    assert torch.equal(again.detach(), low.detach())
    assert torch.equal(after.copies["x"], masters.copies["x"])


def test_masters_of_another_model_are_refused():
    with pytest.raises(SaveError, match="another model: y"):
        Masters().restore({"y|master": torch.ones(2)}, {"x": start()})
    with pytest.raises(SaveError, match="another shape"):
        Masters().restore({"x|master": torch.ones(2)}, {"x": start()})


def test_forgotten_masters_start_from_the_rounded_weight():
    low, masters = start(), Masters()
    optimizer = MAKERS["sgd"]([low])
    steps(low, optimizer, masters, range(3))
    masters.forget(["x"])
    assert not masters.copies
    steps(low, optimizer, masters, [3])
    assert "x" in masters.copies
