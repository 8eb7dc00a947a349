"""Where states of resting layers come back to: the tensor's device, and for counters of steps where the optimizer has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from layerpeft.training.optimizer_states import bring_back, held_by, holders, put_away
from tests.helpers.scheduling import pool_tensors, rows, wrapped


@pytest.mark.parametrize(("options", "there"), [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")])
def test_counters_of_steps_come_back_to_where_the_optimizer_keeps_them(options, there):
    weight = nn.Parameter(torch.ones(3, device="meta"))  # stands for another device than the CPU
    optimizer = torch.optim.AdamW([weight], **options)
    store = {"w": {"step": torch.tensor(7.0), "exp_avg": torch.ones(3), "scale": torch.tensor(2.0)}}
    bring_back([optimizer], {"w": weight}, store)
    places = {key: value.device.type for key, value in optimizer.state[weight].items()}
    assert places == {"step": there, "exp_avg": "meta", "scale": "meta"} and not store


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_what_comes_back_is_what_was_put_away(options):
    weight = nn.Parameter(torch.ones(3))
    optimizer, store = torch.optim.AdamW([weight], **options), {}
    weight.sum().backward()
    optimizer.step()
    before = dict(optimizer.state[weight])
    put_away([optimizer], {"w": weight}, "offload", store)
    bring_back([optimizer], {"w": weight}, store)
    assert optimizer.state[weight].keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[weight].items())


def test_who_holds_a_tensor_is_asked_of_all_live_optimizers_or_the_one_that_steps():
    mine, other, nobodys = (nn.Parameter(torch.ones(1)) for _ in range(3))
    first, second = torch.optim.SGD([mine]), torch.optim.SGD([{"params": [other]}, {"params": []}])
    assert held_by(second) == {id(other)} and holders({id(nobodys)}) == []
    assert holders({id(mine)}) == [first] and holders({id(mine)}, second) == [first]
    assert holders({id(other)}, second) == [second]
    both = holders({id(mine), id(other), id(nobodys)}, first)
    assert len(both) == 2 and first in both and second in both


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("state", ["keep", "clear", "offload"])
@pytest.mark.parametrize("method", ["lora", "galore", "full"])
def test_layers_take_turns_on_an_accelerator(method, state, optim, tmp_path):
    model = wrapped(method, pick="uniform", keep=1, reselect_steps=2, state=state)
    pool = [p for group in pool_tensors(model).values() for p in group.values()]
    before = [p.detach().cpu().clone() for p in pool]
    given = {"optim": optim, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), max_steps=12, per_device_train_batch_size=2, **given)
    Trainer(model, args, train_dataset=rows()).train()
    pool = [p for group in pool_tensors(model).values() for p in group.values()]
    assert any(not torch.equal(p.detach().cpu(), b) for p, b in zip(pool, before, strict=True))
