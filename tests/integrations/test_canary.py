"""The names of PEFT, transformers, TRL, accelerate and torch that are not promised to stay; this file fails first."""

from __future__ import annotations

import copy
import inspect
import re

import peft
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap, save_and_load
from transformers.pytorch_utils import Conv1D
from trl import SFTTrainer

from layerpeft.integrations.peft import LayerPeftType, factors_of, lora_layers, refused_leaves, scale_of
from layerpeft.integrations.torch import has_hook, running_backward
from layerpeft.model.weights import squared_product
from tests.helpers.models import MODELS


def test_peft_takes_a_sibling_type():
    kind = LayerPeftType.LAYER_LORA
    assert kind.value == kind.name == "LAYER_LORA" and hash(kind) == hash("LAYER_LORA")
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        assert "LAYER_LORA" in table and table["LAYER_LORA"] is table[kind]


def test_peft_calls_the_two_hooks_around_injection():
    text = inspect.getsource(BaseTuner.__init__)
    before, inject, after = (
        text.index(n) for n in ("_pre_injection_hook", "self.inject_adapter(", "_post_injection_hook")
    )
    assert before < inject < after


def test_peft_saves_weights_before_the_config():
    text = inspect.getsource(peft.PeftModel.save_pretrained)
    assert text.index("safe_save_file(") < text.rindex("peft_config.save_pretrained(output_dir")


def test_lora_layers_have_what_is_read_from_them():
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert isinstance(layer, LoraLayer) and "default" in layer.r
    assert {"lora_A", "lora_B"} <= set(layer.adapter_layer_names)
    assert layer.get_delta_weight("default").shape == (4, 4)
    assert type(model.base_model) is PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is LoraModel


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_lora_layer_adds_is_the_product_of_its_factors(transposed: bool):
    base = torch.nn.Sequential(Conv1D(6, 4) if transposed else torch.nn.Linear(4, 6), torch.nn.Embedding(5, 4))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False, fan_in_fan_out=transposed)
    for layer in peft.get_peft_model(base, config).base_model.model:
        found, made = factors_of(layer, "default"), layer.get_delta_weight("default")
        assert found is not None
        made = made.T if transposed or isinstance(layer, peft.tuners.lora.Embedding) else made
        torch.testing.assert_close(found.rows(1, 3), made[1:3])
        assert squared_product(found.a, found.b) * found.scale**2 == pytest.approx(float(made.square().sum()))
    others = peft.get_peft_model(torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1)), LoraConfig(r=2, target_modules=["0"]))
    assert factors_of(others.base_model.model[0], "default") is None


def test_transformers_marks_loaded_parameters(llama_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    llama = AutoModelForCausalLM.from_pretrained(llama_path)
    assert all(getattr(p, "_is_hf_initialized", False) for p in llama.parameters())
    model = AutoModelForSequenceClassification.from_pretrained(llama_path, num_labels=3)
    assert not getattr(model.score.weight, "_is_hf_initialized", False)


def test_transformers_has_default_callbacks_and_exportable_state():
    from transformers import trainer
    from transformers.trainer_callback import ExportableState

    assert isinstance(trainer.DEFAULT_CALLBACKS, list) and hasattr(ExportableState, "state")


def test_torch_has_the_global_step_hooks_and_registration_hook():
    from torch.nn.modules.module import register_module_module_registration_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
        register_module_module_registration_hook(lambda *_: calls.append("module")),
    ]
    parameter = torch.nn.Parameter(torch.ones(1))
    torch.optim.SGD([parameter], 0.1).step()
    torch.nn.Module().register_module("inner", torch.nn.Linear(1, 1))
    for handle in handles:
        handle.remove()
    assert calls[:2] == ["pre", "post"] and calls[-1] == "module"


def test_bitsandbytes_has_the_cpu_switch():
    bnb = pytest.importorskip("bitsandbytes")
    assert hasattr(bnb.nn.Linear4bit(4, 4), "support_avx512bf16_for_cpu")


def test_peft_renames_targets_of_fused_experts_and_freezes_some_tensors():
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    assert {"model", "conversions"} <= set(inspect.signature(convert_peft_config_for_transformers).parameters)
    assert isinstance(LoraLayer.__dict__.get("frozen_peft_weight_names", {}), property | dict) or hasattr(
        peft.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
        ).base_model.model[0],
        "frozen_peft_weight_names",
    )


def test_transformers_marks_its_checkpointing():
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import PreTrainedModel

    assert GradientCheckpointingLayer.gradient_checkpointing is False
    assert "make_inputs_require_grads" in inspect.getsource(PreTrainedModel.enable_input_require_grads)
    assert "make_inputs_require_grad" in inspect.getsource(peft.peft_model)


def test_torch_has_traced_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    made = FakeTensor(FakeTensorMode(), torch.empty(2, 3, device="meta"), torch.device("cpu"))
    assert made.shape == (2, 3) and made.device.type == "cpu"


def test_the_autograd_engine_calls_back_at_the_end_of_backward():
    called = []
    x = torch.ones(2, requires_grad=True)
    y = (x * 2).sum()
    y.register_hook(lambda _g: torch.autograd.Variable._execution_engine.queue_callback(lambda: called.append(x.grad)))
    y.backward()
    assert called and torch.equal(called[0], torch.full((2,), 2.0))


def test_accelerate_says_when_gradients_are_complete():
    from accelerate.state import GradientState

    assert GradientState().sync_gradients in (True, False)


def test_torch_keeps_the_hooks_of_a_tensor_where_they_are_looked_for():
    class Mine:
        def __call__(self, gradient):
            return gradient

    tensor = torch.nn.Parameter(torch.ones(2))
    assert not has_hook(tensor, Mine)
    tensor.register_hook(Mine())
    assert has_hook(tensor, Mine) and not has_hook(copy.deepcopy(tensor), Mine)


def test_trl_makes_tokens_without_a_trainer():
    way = SFTTrainer._prepare_dataset
    asked = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert list(inspect.signature(way).parameters) == asked
    assert {"_tokenizer", "chat_template", "completion_only_loss"} == set(
        re.findall(r"\bself\.(\w+)", inspect.getsource(way))
    )


def test_a_running_backward_pass_has_a_number():
    seen, x = [], torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(running_backward()))
    for _ in range(2):
        y.backward(retain_graph=True)
    assert running_backward() is None and len(set(seen)) == 2 and None not in seen


def test_peft_refuses_a_linear_of_mamba_by_the_end_of_its_name():
    with torch.device("meta"):
        model = MODELS["mamba"]()
    assert refused_leaves(model, ["a.in_proj", "a.out_proj"]) == {"out_proj"}


def test_add_adapter_hands_a_tuner_one_config_and_a_model_of_peft_a_dict():
    text = " ".join(inspect.getsource(peft.mapping.inject_adapter_in_model).split())
    assert re.search(r"tuner_cls\( ?model, peft_config,", text)
    assert "{adapter_name: peft_config}" in inspect.getsource(peft.PeftModel.__init__)


def test_peft_looks_up_where_we_listen_when_it_is_called():
    for name in ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"):
        assert inspect.ismethod(getattr(LoraModel, name)), name
        assert f"tuner_cls.{name}(" in inspect.getsource(save_and_load), name
    source = inspect.getsource(save_and_load.get_base_model_state_dict)
    assert "_get_adapter_state_dict_key_prefixes(model)" in source
    assert "hotswap_adapter_from_state_dict(" in inspect.getsource(hotswap.hotswap_adapter)
    assert {"_check_target_module_exists", "_enable_peft_forward_hooks", "add_weighted_adapter"} <= set(dir(LoraModel))
    assert "frozen_peft_weight_names" in dir(LoraLayer) and "delete_adapter" in dir(LoraLayer)


def test_what_peft_multiplies_factors_by_is_known_from_its_config():
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn.q_proj": 3},
    )  # fmt: skip
    for config.use_rslora in (False, True):
        layers = lora_layers(peft.get_peft_model(MODELS["llama"](), config), "default")
        found = {
            n: scale_of(config, n.removeprefix("base_model.model."), layer.r["default"]) for n, layer in layers.items()
        }
        assert found == {name: layer.scaling["default"] for name, layer in layers.items()}
        assert len(set(found.values())) == 3
