"""Whether hidden states are all that blocks below a cut hand upwards, told of a model without weights."""

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, MixtralConfig, MixtralForCausalLM

from layerpeft.errors import ConfigError
from layerpeft.integrations.empty import empty_model
from layerpeft.model.layers import layer_map
from layerpeft.training.prefix.upwards import forms_below

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def forms(kind, config, cut):
    model = empty_model(kind, config, torch.float32)
    return forms_below(model, layer_map(model).names, cut)


@pytest.mark.slow
def test_keys_and_values_that_upper_layers_take_from_lower_ones_are_seen():
    sharing = {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    small = {"intermediate_size": [24] * 6, "vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 4}
    config = Gemma3nTextConfig(**SIZES, **sharing, **small, laurel_rank=2, activation_sparsity_pattern=[0.0] * 6)
    assert forms(Gemma3nForCausalLM, config, 2) == [None, None]
    with pytest.raises(ConfigError, match="from what enters layer 3 alone the model gives out something else"):
        forms(Gemma3nForCausalLM, config, 3)  # the last two layers take those of layers 2 and 3


def test_what_a_router_says_to_the_loss_is_seen_where_it_is_said():
    small = {"num_hidden_layers": 3, "intermediate_size": 24, "num_local_experts": 2, "num_experts_per_tok": 1}
    assert forms(MixtralForCausalLM, MixtralConfig(**SIZES, **small), 2) == [None, None]
    with pytest.raises(ConfigError, match="more than hidden states goes upwards"):
        forms(MixtralForCausalLM, MixtralConfig(**SIZES, **small, output_router_logits=True), 2)
