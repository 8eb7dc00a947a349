"""Which containers are a stack of layers, in hand-written models too; what is refused, and how it is said."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import nn

from layerpeft.errors import LayerMapError
from layerpeft.model.architectures import role_of
from layerpeft.model.layers import base_of, find_module, layer_map
from tests.helpers.models import MODELS, NanoAttention, NanoBlock, NanoMLP


class Holder(nn.Module):
    """A model made of named parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def mlp(wide: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, wide), nn.ReLU(), nn.Linear(wide, 8))


def moe_block() -> nn.Module:
    experts = nn.ModuleList([Holder(w1=nn.Linear(8, 4), w3=nn.Linear(8, 4), w2=nn.Linear(4, 8)) for _ in range(2)])
    return Holder(attn=Holder(q_proj=nn.Linear(8, 8)), moe=Holder(gate=nn.Linear(8, 2), experts=experts))


def stage(blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Holder(dwconv=nn.Conv2d(8, 8, 3, groups=8), fc1=nn.Linear(8, 8)) for _ in range(blocks)))


def names(model: nn.Module, stack: str | None = None) -> list[str]:
    return [layer.name for layer in layer_map(model, stack).layers]


def refused(model: nn.Module, stack: str | None = None) -> str:
    with pytest.raises(LayerMapError) as error:
        layer_map(model, stack)
    return str(error.value)


def test_torch_transformer_encoder():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    found = layer_map(layers)
    assert found.stack == "layers" and found.model_type == "TransformerEncoder"
    assert [(t.name, t.role, t.shape) for t in found.layers[2].targets] == [
        ("layers.2.self_attn.out_proj", "attention.o", (8, 8)),  # not in_proj_weight: it is no module
        ("layers.2.linear1", "mlp.up", (16, 8)),
        ("layers.2.linear2", "mlp.down", (8, 16)),
    ]
    assert found.layers[2].params == sum(p.numel() for p in layers.layers[2].parameters())


def test_torch_transformer_has_two_stacks():
    found = layer_map(nn.Transformer(8, 2, 2, 3, 16))
    assert found.stack == "decoder.layers" and len(found) == 3
    assert found.stacks == ("encoder=encoder.layers", "decoder=decoder.layers")
    assert [t.role for t in found.layers[0].targets][:2] == ["attention.o", "cross_attention.o"]


def test_sequential_of_same_class_blocks():
    model = Holder(stem=nn.Conv2d(3, 8, 4), blocks=nn.Sequential(*(NanoBlock() for _ in range(4))), head=mlp())
    assert names(model) == [f"blocks.{i}" for i in range(4)]
    assert layer_map(model).stacks == ("blocks",)


def test_whole_model_as_one_sequential():
    model = nn.Sequential(nn.Embedding(9, 32), NanoBlock(), NanoBlock(), nn.LayerNorm(32), nn.Linear(32, 9))
    found = layer_map(model)
    assert [layer.name for layer in found.layers] == ["1", "2"] and found.stack == ""
    assert found.layers[1].targets[0].name == "2.attn.c_attn"
    assert "in the model itself" in found.table()


def test_blocks_of_different_classes_are_one_stack():
    parts = [NanoBlock(), Holder(mlp=NanoMLP()), NanoBlock(), Holder(mlp=NanoMLP())]
    found = layer_map(Holder(layers=nn.ModuleList(parts)))
    assert [layer.kind for layer in found.layers] == ["NanoBlock", "Holder"] * 2
    assert [len(layer.targets) for layer in found.layers] == [4, 2, 4, 2]


def test_blocks_that_are_lists_themselves():
    pairs = nn.ModuleList([nn.ModuleList([NanoAttention(), NanoMLP()]) for _ in range(3)])
    assert names(Holder(layers=pairs)) == ["layers.0", "layers.1", "layers.2"]


def test_stages_of_blocks_give_the_largest_stage():
    model = Holder(features=nn.Sequential(mlp(), stage(2), mlp(), stage(5), mlp(), stage(3)))
    found = layer_map(model)
    assert found.stack == "features.3" and found.stacks == ("features.1", "features.3", "features.5")
    assert [(t.kind, t.shape) for t in found.layers[0].targets] == [("conv", (8, 1, 3, 3)), ("linear", (8, 8))]
    assert names(model, "features.5") == ["features.5.0", "features.5.1", "features.5.2"]


def test_marked_stages_are_the_layers_and_their_blocks_are_reached_by_path():
    config = tf.SwinConfig(embed_dim=8, depths=[2, 4], num_heads=[2, 2], image_size=16, patch_size=4, window_size=2)
    model = tf.SwinModel(config)
    assert names(model) == ["encoder.layers.0", "encoder.layers.1"]
    assert len(layer_map(model, "encoder.layers.1.blocks")) == 4


def test_list_of_experts_inside_a_block_is_not_the_stack():
    found = layer_map(Holder(layers=nn.ModuleList([moe_block() for _ in range(2)])))
    assert found.stack == "layers" and found.stacks == ("layers",)
    assert {t.role: t.shape for t in found.layers[1].targets} == {
        "attention.q": (8, 8),
        "moe.router": (2, 8),
        "moe.experts.gate": (4, 8),
        "moe.experts.up": (4, 8),
        "moe.experts.down": (8, 4),
    }
    assert sum(t.role == "moe.experts.up" for t in found.layers[1].targets) == 2
    assert "moe.experts: gate 4x8 (2 times), up 4x8 (2 times), down 8x4 (2 times)" in found.table()


def test_list_of_towers_is_not_the_stack():
    with torch.device("meta"):
        towers = nn.ModuleList([tf.LlamaModel(tf.LlamaConfig(num_hidden_layers=n, vocab_size=9)) for n in (2, 3)])
    found = layer_map(Holder(towers=towers))
    assert found.stack == "towers.1.layers" and found.stacks == ("towers.0.layers", "towers.1.layers")


def test_vision_and_bridge_stacks_give_way_to_text():
    parts = {name: nn.ModuleList([NanoBlock() for _ in range(4)]) for name in ("visual", "resampler")}
    model = Holder(**parts, language_model=nn.ModuleList([NanoBlock() for _ in range(2)]))
    found = layer_map(model)
    assert found.stack == "language_model" and found.stacks == ("visual", "resampler", "text=language_model")
    message = refused(model, "vision")
    assert message.startswith("2 stacks fit stack='vision': give the path of one.")
    assert "visual: 4 NanoBlock; resampler: 4 NanoBlock; text=language_model: 2 NanoBlock" in message


def test_unknown_stack_names_the_nearest_and_all_found():
    message = refused(MODELS["t5"](), "decodr")
    assert message == (
        "unknown stack 'decodr'. Did you mean 'decoder'? "
        "Found: encoder=encoder.block: 3 T5Block; decoder=decoder.block: 3 T5Block."
    )
    message = refused(MODELS["llama"](), "model.layer")
    assert "Did you mean 'model.layers'?" in message and "model.layers: 3 LlamaDecoderLayer" in message
    assert refused(MODELS["llama"](), "model.norm").startswith("unknown stack 'model.norm'.")


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (nn.Linear(4, 4), "Found: no submodules."),
        (Holder(net=mlp()), "Found: net (Sequential of Linear, ReLU)."),
        (Holder(heads=nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])), "Found: heads (ModuleList of Linear)."),
        (Holder(embed=nn.Embedding(4, 4), out=nn.Linear(4, 4)), "Found: embed (Embedding), out (Linear)."),
        (Holder(blocks=nn.ModuleList([NanoBlock()])), "Found: blocks (ModuleList of NanoBlock)."),
        (nn.Sequential(NanoAttention(), NanoMLP()), "Found: the model itself (Sequential of NanoAttention, NanoMLP)."),
    ],
)
def test_models_without_repeated_blocks(model, shown):
    message = refused(model)
    assert f"{type(model).__name__} has no repeated blocks" in message and 'select="all"' in message
    assert message.endswith(shown)


def test_shared_layers_are_told_apart():
    block = NanoBlock()
    tied = nn.ModuleList([NanoBlock(), NanoBlock()])
    for first, second in zip(tied[0].modules(), tied[1].modules(), strict=True):
        second._parameters.update(first._parameters)
    groups = tf.AlbertConfig(hidden_size=8, embedding_size=8, num_attention_heads=2, num_hidden_groups=2, vocab_size=9)
    one, two = "share one set of weights", "the 12 layers of this model share 2 sets of weights"
    for model, text in (
        (MODELS["albert"](), "the 3 layers of this model share one set of weights"),
        (Holder(layers=nn.ModuleList([block] * 3)), f"the 3 layers of this model {one} (layers)"),
        (Holder(layers=tied), f"the 2 layers of this model {one} (layers)"),
        (tf.AlbertModel(groups), two),
    ):
        message = refused(model)
        assert message.startswith(text) and 'select="all"' in message


def test_a_model_of_one_layer_is_no_shared_one():
    model = tf.LlamaModel(tf.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    assert names(model) == ["layers.0"]


def test_find_module_and_its_errors():
    model = MODELS["llama"]()
    assert find_module(model, "model.layers.2.mlp") is model.get_submodule("model.layers.2.mlp")
    assert find_module(model, "") is model and base_of(model) is model
    assert find_module(model, "model.norm.weight") is model.get_submodule("model.norm")
    told = r"model\.layers\.0\.mlp has no 'up_prj'\. Did you mean 'model\.layers\.0\.mlp\.up_proj'\?"
    with pytest.raises(LayerMapError, match=told):
        find_module(model, "model.layers.0.mlp.up_prj")
    with pytest.raises(LayerMapError, match="its root has no 'base_model'"):
        find_module(model, "base_model.model.layers")


def test_table_folds_equal_layers():
    assert layer_map(MODELS["jamba"]()).table().splitlines() == [
        "jamba: 3 layers in model.layers, 23 targets, 46,208 weights",
        "layer  class                       targets (out x in)                                          params",
        "0      JambaMambaDecoderLayer      mixer: conv 64x1x4, in 128x32, x 18x64, dt 64x2, out 32x64  13,074",
        "                                   mlp: gate 48x32, up 48x32, down 32x48",
        "1      JambaAttentionDecoderLayer  attention: q 32x32, k 16x32, v 16x32, o 32x32               21,696",
        "                                   moe: router 4x32",
        "                                   moe.experts: gate_up 4x96x32, down 4x32x48",
        "2      JambaMambaDecoderLayer      mixer: conv 64x1x4, in 128x32, x 18x64, dt 64x2, out 32x64  13,074",
        "                                   mlp: gate 48x32, up 48x32, down 32x48",
    ]
    lines = layer_map(MODELS["nanogpt"]()).table().splitlines()
    assert lines == [
        "NanoGPT: 3 layers in transformer.h, 12 targets, 21,504 weights",
        "layer  class      targets (out x in)             params",
        "0-2    NanoBlock  attention: qkv 96x32, o 32x32   7,504",
        "                  mlp: up 48x32, down 32x48",
    ]


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("self_attn.q_a_proj", "attention.q_a"),
        ("self_attn.kv_a_proj_with_mqa", "attention.kv_a"),
        ("encoder_attn.out_proj", "cross_attention.o"),
        ("block_sparse_moe.experts.3.w2", "moe.experts.down"),
        ("mixer.q_proj", "attention.q"),
        ("mixer.down_proj", "mlp.down"),
        ("mlp.gate", "mlp.gate"),
        ("mlp.router", "moe.router"),
        ("fc1", "mlp.up"),
        ("q_proj", "attention.q"),
        ("ffn.lin2", "mlp.down"),
        ("projection", "other"),
    ],
)
def test_roles_from_names(path, role):
    assert role_of(path) == role
    assert role_of(path, moe=True) == ("moe.router" if path == "mlp.gate" else role)


def test_fingerprint_depends_on_names_shapes_and_kinds():
    def build(blocks: int = 2, name: str = "layers", block: Callable[[], nn.Module] = NanoBlock) -> str:
        return layer_map(Holder(**{name: nn.ModuleList([block() for _ in range(blocks)])})).fingerprint

    prints = [build(), build(3), build(name="h"), build(block=lambda: Holder(mlp=NanoMLP())), build(block=moe_block)]
    assert len(set(prints)) == 5 and build() == prints[0]
    half = Holder(layers=nn.ModuleList([NanoBlock() for _ in range(2)])).to(torch.bfloat16)
    assert layer_map(half).fingerprint == prints[0]


def test_fast_enough_for_32_layers():
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=32))
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        assert len(layer_map(model).targets) == 224
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.03  # seconds; about 0.005 on the machine of the authors
