"""What full training relies on in PEFT and PEFT does not promise to keep."""

from __future__ import annotations

import inspect

import peft
import torch
from peft.utils import other
from torch import nn

from layerpeft.integrations.peft import DUMMY_TARGET_MODULES, HEADS, ModulesToSaveWrapper


def test_peft_takes_a_config_without_any_target():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    config = peft.LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["1"])
    wrapped = peft.get_peft_model(model, config)
    assert type(wrapped.base_model.model[1]) is ModulesToSaveWrapper and type(wrapped.base_model.model[0]) is nn.Linear


def test_peft_takes_a_wrapper_that_is_there_already():
    class Own(ModulesToSaveWrapper):
        def update(self, adapter_name, *args, **kwargs):
            self._adapters.add(adapter_name)
            self.modules_to_save[adapter_name] = self.original_module

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1] = Own(model[1], "default")
    inner = model[1].original_module
    config = peft.LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=["1"])
    wrapped = peft.get_peft_model(model, config)
    held = wrapped.base_model.model[1]
    assert type(held) is Own and held.modules_to_save["default"] is inner is held.original_module
    assert inner.weight.requires_grad


def test_peft_matches_modules_to_save_by_the_ends_of_names():
    assert "key.endswith(target_key) for target_key in module_names" in inspect.getsource(other._set_trainable)


def test_peft_adds_these_heads_by_itself():
    text = inspect.getsource(peft.peft_model)
    assert all(f'"{head}"' in text for head in HEADS)


def test_the_members_that_are_overridden_are_there():
    for name in (
        "update",
        "enable_adapters",
        "set_adapter",
        "delete_adapter",
        "adapter_state_dict",
        "adapter_state_dict_load_map",
        "unload_and_optionally_merge_module",
        "_mixed_batch_forward",
    ):
        assert callable(getattr(ModulesToSaveWrapper, name))
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "default")
    assert wrapper._adapters == {"default"} and not wrapper._disable_adapters
    assert torch.equal(wrapper.modules_to_save["default"].weight, wrapper.original_module.weight)
