"""What torch does not promise about DDP, and who watches PEFT's saving; this file fails first."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerpeft.integrations.distributed import Part, awaits_every_gradient
from layerpeft.integrations.engines.known import is_cut, local
from layerpeft.integrations.peft import watch_saving
from layerpeft.training.optimizer_states import bring_back, divided, put_away
from tests.helpers.loops import llama


def test_ddp_says_that_its_forward_pass_runs(monkeypatch):
    assert DistributedDataParallel._active_ddp_module is None and not awaits_every_gradient()
    for unused, static, awaits in ((False, False, True), (True, False, False), (True, True, True)):
        running = nn.Module()
        running.find_unused_parameters, running.static_graph = unused, static
        monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", running)
        assert awaits_every_gradient() == awaits


def test_saving_is_watched_once_and_left_alone_for_others(tmp_path):
    watch_saving(is_cut)
    watched = PeftModel.save_pretrained
    watch_saving(is_cut)
    assert PeftModel.save_pretrained is watched
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_tensor_that_is_whole_is_its_own_part():
    weight = nn.Parameter(torch.ones(3))
    assert local(weight) is weight and not is_cut(weight)
    optimizer, store = torch.optim.AdamW([weight]), {}
    weight.sum().backward()
    optimizer.step()
    before = dict(optimizer.state[weight])
    put_away([optimizer], {"w": weight}, "offload", store)
    assert not optimizer.state and not divided(store) and divided({"w": {"exp_avg": Part(weight, 0, 0, 0, 0)}})
    bring_back([optimizer], {"w": weight}, store)
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[weight].items()) and not store
