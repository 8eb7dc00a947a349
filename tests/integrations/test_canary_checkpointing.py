"""The names by which layerpeft.integrations.checkpointing knows what transformers, PEFT and torch do; this file fails first."""

from __future__ import annotations

import functools
import inspect

import peft
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder
from transformers.models.t5.modeling_t5 import T5Attention

from layerpeft.integrations import checkpointing


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def test_blocks_are_checkpointed_by_a_function_that_lies_beside_their_flag():
    model = llama()
    block = model.model.layers[0]
    assert isinstance(block, GradientCheckpointingLayer) and not checkpointing.is_reentrant(block)
    for keywords, reentrant in (({"use_reentrant": False}, False), ({"use_reentrant": True}, True), ({}, True)):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
        function = vars(block)["_gradient_checkpointing_func"]
        assert isinstance(function, functools.partial) and function.func is checkpoint and function.keywords == keywords
        assert block.gradient_checkpointing and checkpointing.is_reentrant(block) == reentrant
    model.gradient_checkpointing_disable()
    assert not block.gradient_checkpointing and not checkpointing.is_reentrant(block)


def test_torch_takes_the_reentrant_way_where_none_is_named():
    text = inspect.getsource(checkpoint)
    assert "if use_reentrant is None:" in text and "use_reentrant = True" in text


def test_blocks_call_the_function_with_themselves_and_their_inputs_by_position():
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    block, seen = model.model.layers[0], []
    hooks = block.register_forward_pre_hook(lambda *_: seen.append("hook"))
    block._gradient_checkpointing_func = lambda function, *args: seen.append(len(args)) or function(*args)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    hooks.remove()
    assert seen == ["hook", 1]  # hooks on a block run outside of what is recomputed


def test_the_hooks_that_let_gradients_in():
    model = llama()
    model.enable_input_require_grads()
    (hook,) = model.get_input_embeddings()._forward_hooks.values()
    assert checkpointing.lets_gradients_in(model.get_input_embeddings())
    assert (hook.__name__, hook.__module__) == ("make_inputs_require_grads", "transformers.modeling_utils")
    for function in (peft.PeftModel._prepare_model_for_gradient_checkpointing, peft.prepare_model_for_kbit_training):
        assert "def make_inputs_require_grad(" in inspect.getsource(function)
    assert list(inspect.signature(PreTrainedModel.enable_input_require_grads).parameters) == ["self"]


def test_the_flags_that_let_gradients_in():
    text = inspect.getsource(T5Attention.forward)
    assert "if self.gradient_checkpointing and self.training:" in text and "position_bias.requires_grad = True" in text
    text = inspect.getsource(HubertFeatureEncoder)
    assert "self._requires_grad = True" in text and "if self._requires_grad and self.training:" in text
