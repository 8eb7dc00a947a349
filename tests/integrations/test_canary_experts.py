"""What layerpeft relies on in PEFT's wrapper of a parameter of experts: fails before users do."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.integrations.peft import is_traced, stores_out_first
from layerpeft.tuners.galore.projection import lefts, rights
from tests.helpers.expert_models import EXPERTS, build


@pytest.mark.parametrize(("name", "out_first"), [("mixtral", True), ("gpt_oss", False)])
def test_factors_of_experts_are_laid_out_as_they_were(name, out_first):
    config = LayerLoraConfig(select=2, r=2, lora_alpha=3, target_modules=[], target_parameters=EXPERTS)
    model = get_peft_model(build(name), config)
    outer = model.get_submodule("base_model.model.model.layers.2.mlp.experts")
    inner = outer.base_layer
    assert isinstance(outer, ParamWrapper) and isinstance(inner, ParamWrapper)
    assert {outer.parameter_name, inner.parameter_name} == {"gate_up_proj", "down_proj"}
    for layer in (outer, inner):
        assert stores_out_first(layer) is out_first and layer.get_base_layer() is inner.base_layer
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(b)
        change = 1.5 * lefts(b, 4) @ rights(a, 4)
        stored = change if out_first else change.mT
        assert stored.shape == layer.get_param().shape
        torch.testing.assert_close(layer.get_delta_weight("default"), stored)


def test_what_has_no_values_is_known():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        traced = torch.ones(2)
    assert is_traced(traced) and is_traced(torch.ones(2, device="meta")) and not is_traced(torch.ones(2))
