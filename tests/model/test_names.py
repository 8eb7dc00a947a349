"""A module has one name, whatever stands around it."""

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from layerpeft.model.layers import find_module, layer_map
from layerpeft.model.names import clean, unwrapped
from tests.helpers.loops import llama

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("word", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"])
def test_what_a_wrapper_adds_to_a_name_is_taken_out_anywhere(word):
    parts = NAME.split(".")
    for place in range(len(parts) + 1):
        assert clean(".".join([*parts[:place], word, *parts[place:]])) == NAME
    assert clean(f"{NAME}.{word}.weight") == f"{NAME}.weight"


def test_other_words_stay():
    for name in ("", "base_layers.0", "my_base_layer.weight", "model.original_modules", "module.a", "_orig_model.a"):
        assert clean(name) == name
    assert clean("head.original_module.weight") == "head.weight"


class FSDP(nn.Module):
    """As torch's, which needs processes: one child under its name."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper, FSDP, lambda m: FSDP(checkpoint_wrapper(m))])
def test_a_wrapped_block_has_the_names_it_had(wrap):
    model = llama()
    before, block = layer_map(model), model.model.layers[0]
    model.model.layers[0] = wrap(block)
    assert unwrapped(model.model.layers[0]) is block
    assert layer_map(model) == before and find_module(model, NAME) is block.self_attn.q_proj
    names = {clean(n) for n, _ in model.named_parameters()}
    assert names == {n for n, _ in llama().named_parameters()}


def test_adapters_hide_nothing():
    model = llama()
    linear = model.model.layers[0].self_attn.q_proj
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1])
    wrapped = peft.get_peft_model(model, config)
    inner = wrapped.base_model.model
    assert unwrapped(inner.model.layers[0].self_attn.q_proj) is linear
    assert unwrapped(inner.model.embed_tokens) is find_module(wrapped, "model.embed_tokens")
    assert type(unwrapped(inner.model.embed_tokens)) is nn.Embedding and type(unwrapped(inner.lm_head)) is nn.Linear
    names = {clean(n) for n, m in inner.named_modules() if isinstance(m, nn.Linear)}
    assert {NAME, "lm_head"} <= names
