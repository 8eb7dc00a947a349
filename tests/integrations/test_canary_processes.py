"""What torch does not promise about DDP, and who watches PEFT's saving; this file fails first."""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from layerpeft import LayerLoraConfig
from layerpeft.integrations.distributed import Part, awaits_every_gradient
from layerpeft.integrations.engines.fsdp import give_up, is_cut_by_rows, is_inside
from layerpeft.integrations.engines.known import is_cut, local
from layerpeft.integrations.peft import watch_saving
from layerpeft.integrations.torch import in_states
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


def test_names_that_divided_weights_hang_on_are_there():
    for name in ("_load_from_checkpoint", "_load_best_model", "save_model"):
        assert callable(getattr(Trainer, name))
    assert list(inspect.signature(Trainer._load_from_checkpoint).parameters)[1] == "resume_from_checkpoint"
    given = {"model", "config", "adapter_name", "state_dict"}
    assert given <= set(inspect.signature(BaseTuner._get_adapter_state_dict).parameters)
    assert callable(tuners_utils._get_tuner_state_dict_key_prefixes)
    assert callable(FSDPModule.set_modules_to_backward_prefetch) and callable(FSDPModule.reshard)
    assert _CHECKPOINT_PREFIX == "_checkpoint_wrapped_module." and in_states(f"a.{_CHECKPOINT_PREFIX}b") == "a.b"


def test_fsdp2_gathers_from_storage_of_its_own():
    """Why a projection's weight and what it was change places by their numbers, and not by their storage, where it is divided."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        linear, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
        outer = fully_shard(nn.Sequential(linear), mesh=init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            kept = local(linear.weight).clone()
            before = outer(x)
            for numbers in (torch.zeros_like(kept), kept):
                assert is_inside(linear) and not is_cut(linear.weight)  # which stays gathered
                give_up(linear)
                assert is_cut_by_rows(linear.weight) and is_cut(linear.weight)
                local(linear.weight).copy_(numbers)
                assert bool(outer(x).any()) == bool(numbers.any())
            outer.reshard()
            linear.weight.data = torch.zeros_like(linear.weight)
            assert torch.equal(outer(x), before) and bool(before.any())
    finally:
        dist.destroy_process_group()


def test_an_adapter_under_activation_checkpointing_is_saved_whole(tmp_path):
    model = get_peft_model(llama(), LayerLoraConfig(select="last:1", target_modules=["q_proj"]))
    names = set(get_peft_model_state_dict(model))
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    assert set(get_peft_model_state_dict(model)) == names and names
    model.save_pretrained(tmp_path)
    other = get_peft_model(llama(), LayerLoraConfig(select="last:1", target_modules=["q_proj"]))
    other.load_adapter(str(tmp_path), "default")
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == names


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
