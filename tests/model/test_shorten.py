"""A model without some of its layers: what it computes, what plain transformers loads, and what its config says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

from layerpeft.errors import ConfigError, LayerpeftError
from layerpeft.model.layers import find_module, layer_map
from layerpeft.model.shorten import shortened, silence
from layerpeft.model.units import in_units
from layerpeft.selection.scorers.removal import left_out, silent
from tests.helpers.models import HEADS, HIDDEN, INNER, MODELS, VOCAB, batch

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 6, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _causal(family: str, config: str = "", **options: Any) -> Any:
    kind = getattr(tf, f"{config or family}Config")
    return getattr(tf, f"{family}ForCausalLM")(kind(**_SMALL | options)).eval()


def _logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    found = getattr(output, "logits", None)
    return output[0] if found is None else found


def _loads_short(model: Any, drop: list[int], inputs: Any, folder: Any) -> Any:
    """Shortens, and holds it against the whole model with these layers bypassed, and against what plain transformers loads."""
    layers = layer_map(model)
    new: Any = shortened(model, layers, set(range(len(layers))) - set(drop))
    with left_out([find_module(model, layers.names[i]) for i in drop]):
        wanted = _logits(model, inputs)
    assert torch.allclose(_logits(new.eval(), inputs), wanted, atol=1e-5)
    new.save_pretrained(folder)
    again, found = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()) and "_weight_conversions" in vars(
        again
    )  # by which a twin is saved under the names of files
    assert torch.allclose(_logits(again.eval(), inputs), wanted, atol=1e-5)
    assert len(layer_map(again, layers.stack)) == len(layers) - len(drop)
    return again.config


QUICK = ("llama", "gemma3_vlm", "t5")
LATER = [name for name in MODELS if name not in (*QUICK, "nanogpt", "albert", "zamba2", "jamba", "dinov2")]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in LATER)])
def test_a_shorter_model_computes_what_the_whole_one_does_without_the_layer(name, tmp_path):
    model = MODELS[name]().eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = batch(name, model)
    _logits(model, inputs)  # classifiers write into their config what their labels are
    said = copy.deepcopy(model.config.to_dict())
    _loads_short(model, [1], inputs, tmp_path)
    assert model.config.to_dict() == said and len(layer_map(model)) == 3
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# what a config says of single layers: lists, lists of numbers, counts of the first, formulas that it has a list for
FOLLOWED: dict[str, tuple[Any, list[int], dict[str, Any]]] = {
    "indices": (
        lambda: _causal("Qwen2Moe", **_MOE, shared_expert_intermediate_size=16, mlp_only_layers=[0, 3]),
        [1, 4],
        {"mlp_only_layers": [0, 2], "num_hidden_layers": 4},
    ),
    "formula": (
        lambda: _causal("Qwen3Moe", **_MOE, head_dim=8, decoder_sparse_step=2),
        [1],
        {"mlp_only_layers": [0, 1, 3], "decoder_sparse_step": 1},
    ),
    "flags": (lambda: _causal("SmolLM3", no_rope_layer_interval=3), [1, 4], {"no_rope_layers": [1, 0, 1, 0]}),
    "types": (
        lambda: _causal("Gemma3", "Gemma3Text", head_dim=8, sliding_window=4, sliding_window_pattern=3),
        [1],
        {"layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")]},
    ),
    "first": (
        lambda: _causal(
            "DeepseekV3", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
            first_k_dense_replace=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
            num_key_value_heads=4,
        ),
        [1, 4],
        {"first_k_dense_replace": 1},
    ),
    "window": (
        lambda: _causal("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3),
        [1, 4],
        {"max_window_layers": 2, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["indices", "formula", *(pytest.param(n, marks=pytest.mark.slow) for n in [*FOLLOWED][2:])]
)
def test_whatever_the_config_says_of_each_layer_follows(name, tmp_path):
    make, drop, wanted = FOLLOWED[name]
    config = _loads_short(make(), drop, {"input_ids": torch.arange(4, 20)[None]}, tmp_path)
    assert {key: getattr(config, key) for key in wanted} == wanted


REFUSED = {
    "jamba": (MODELS["jamba"], [0], "model.layers.0 would be a JambaMambaDecoderLayer, not a JambaAttentionDecoderLayer"),
    "zamba2": (MODELS["zamba2"], [0], "share weights"),
    "albert": (MODELS["albert"], [0], "share one set of weights"),
    "t5": (MODELS["t5"], [0], "has_relative_attention_bias"),
    "nanogpt": (MODELS["nanogpt"], [0], "no config"),
    "scaled by place": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, scale_attn_by_inverse_layer_idx=True)
        ),
        [1],
        "scaling would be",
    ),
    "gemma3n": (
        lambda: _causal(
            "Gemma3n", "Gemma3nText", intermediate_size=[INNER] * 6, head_dim=8, vocab_size_per_layer_input=VOCAB, laurel_rank=4,
            hidden_size_per_layer_input=8, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3,
            activation_sparsity_pattern=[0.0] * 6,
        ),
        [1],
        "embed_tokens_per_layer.weight would have the shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_stand_without_a_layer_is_refused_by_name(name):
    make, drop, wanted = REFUSED[name]
    model = make()
    with pytest.raises(LayerpeftError, match=wanted.replace(".", r"\.")):
        layers = layer_map(model)
        shortened(model, layers, set(range(len(layers))) - set(drop))


@pytest.mark.parametrize("name", ["llama", "mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_silenced_part_adds_nothing_and_nothing_else_changes(name):
    model = MODELS[name]().eval()
    layers = layer_map(model)
    units, _ = in_units(layers, "sublayer", layers.targets)
    inputs, before = batch(name, model), {n: p.clone() for n, p in model.named_parameters()}
    last = [t.name for i in (1, 2) for t in units.layers[i].targets if t.role.rpartition(".")[2] in ("o", "down")]
    with silent([find_module(model, n) for n in last]):
        wanted = _logits(model, inputs)
    assert silence(model, units, [1, 2]) == last
    assert torch.allclose(_logits(model, inputs), wanted, atol=1e-5)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(any(n.startswith(name) for name in last) for n in moved)


def test_no_layer_left_is_an_error():
    model = MODELS["llama"]()
    with pytest.raises(ConfigError, match="no layer is left"):
        shortened(model, layer_map(model), [])
