"""What layerpeft's loading and saving know of transformers, bitsandbytes and glibc beyond their promises."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from layerpeft.integrations import filling
from layerpeft.integrations.empty import empty_model
from layerpeft.integrations.torch import _trim, give_back
from tests.helpers.loops import llama
from tests.helpers.models import MODELS


def test_a_quantizer_of_our_own_is_handed_each_weight_alone_with_its_bias_there_already(tmp_path):
    llama(attention_bias=True).save_pretrained(tmp_path, max_shard_size="10KB")
    seen, living = [], weakref.WeakSet()

    def store(name, linear):
        seen.append(name)
        assert linear.bias is not None and not linear.bias.is_meta and not linear.weight.is_meta
        living.add(linear.weight)
        assert len(living) == 1  # the one before is gone
        return nn.Identity()

    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "kqv"]
    settings = filling.settings(store, names, lambda n, w: w.element_size())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    assert sorted(seen) == sorted(names)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert "is_quantized" not in vars(model) and "quantization_method" not in vars(model)
    assert all(getattr(p, filling.LOADED_MARK) for p in model.parameters())
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Identity)


@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_a_model_without_weights_draws_no_numbers_and_ties_what_is_tied(name, monkeypatch):
    whole = MODELS[name]()
    whole.config.tie_word_embeddings = True
    whole = type(whole)(whole.config)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda *_: pytest.fail("numbers are drawn"))
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *_: pytest.fail("numbers are drawn"))
    empty = empty_model(type(whole), whole.config)
    shapes = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (empty, whole)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in empty.parameters())
    assert empty.get_input_embeddings().weight is empty.get_output_embeddings().weight


def test_the_registry_takes_a_quantizer_and_keeps_the_one_we_gave():
    settings = filling.settings(lambda n, linear: linear, (), lambda n, w: 1.0)
    found = AUTO_QUANTIZER_MAPPING[filling.METHOD](settings, pre_quantized=False)
    assert isinstance(found, HfQuantizer) and isinstance(found.get_quantize_ops(), ConversionOps)


def test_freed_memory_goes_back_to_the_system():
    if _trim() is None:
        pytest.skip("no glibc")
    held = [torch.ones(1 << 18) for _ in range(64)]  # 1 MB each: below the size that the system takes back by itself
    last = torch.ones(1 << 10)
    before = anonymous()
    del held
    give_back()
    assert before - anonymous() > 48 << 20 and last.sum() == 1 << 10


def anonymous():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
