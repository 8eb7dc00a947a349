"""The layer map: every architecture from a tiny config, wrapped and unwrapped, real and on the meta device."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from layerpeft.model.architectures import stack_labels
from layerpeft.model.layers import LayerMap, base_of, find_module, layer_map
from tests.helpers.models import FAMILIES, MODELS, batch, loss_of
from tests.helpers.repeating import some

MAPPED = sorted(set(MODELS) - {"albert"})
FEW = FAMILIES - {"albert"}
STACKS = {  # name -> (stack, layers, targets of one layer)
    "llama": ("model.layers", 3, 7),
    "mistral": ("model.layers", 3, 7),
    "qwen2": ("model.layers", 3, 7),
    "qwen3": ("model.layers", 3, 7),
    "gemma2": ("model.layers", 3, 7),
    "gemma3_text": ("model.layers", 3, 7),
    "phi3": ("model.layers", 3, 4),
    "olmo2": ("model.layers", 3, 7),
    "granite": ("model.layers", 3, 7),
    "starcoder2": ("model.layers", 3, 6),
    "gpt2": ("transformer.h", 3, 4),
    "gpt_neox": ("gpt_neox.layers", 3, 4),
    "opt": ("model.decoder.layers", 3, 6),
    "bloom": ("transformer.h", 3, 4),
    "falcon": ("transformer.h", 3, 4),
    "mixtral": ("model.layers", 3, 7),
    "qwen3_moe": ("model.layers", 3, 7),
    "qwen2_moe": ("model.layers", 3, 11),
    "gpt_oss": ("model.layers", 3, 7),
    "mamba": ("backbone.layers", 3, 5),
    "jamba": ("model.layers", 3, 7),
    "qwen3_next": ("model.layers", 3, 11),
    "zamba2": ("model.layers", 4, 14),
    "nanogpt": ("transformer.h", 3, 4),
    "bert": ("bert.encoder.layer", 3, 6),
    "roberta": ("roberta.encoder.layer", 3, 6),
    "distilbert": ("distilbert.transformer.layer", 3, 6),
    "deberta_v2": ("deberta.encoder.layer", 3, 6),
    "modernbert": ("model.layers", 3, 4),
    "t5": ("decoder.block", 3, 10),
    "bart": ("model.decoder.layers", 3, 10),
    "vit": ("vit.layers", 3, 6),
    "dinov2": ("dinov2.encoder.layer", 3, 6),
    "llama_bare": ("layers", 3, 7),
    "whisper": ("model.decoder.layers", 3, 10),
    "gemma3_vlm": ("model.language_model.layers", 3, 7),
}
_QKVO = ["self_attn.q_proj attention.q 32x32", "self_attn.k_proj attention.k 16x32"]
_QKVO += ["self_attn.v_proj attention.v 16x32", "self_attn.o_proj attention.o 32x32"]
LAYER_1 = {  # every target of layer 1: name in the block, role, shape
    "llama": [*_QKVO, "mlp.gate_proj mlp.gate 48x32", "mlp.up_proj mlp.up 48x32", "mlp.down_proj mlp.down 32x48"],
    "phi3": [
        "self_attn.o_proj attention.o 32x32",
        "self_attn.qkv_proj attention.qkv 64x32",
        "mlp.gate_up_proj mlp.gate_up 96x32",
        "mlp.down_proj mlp.down 32x48",
    ],
    "gpt2": [
        "attn.c_attn attention.qkv 96x32",
        "attn.c_proj attention.o 32x32",
        "mlp.c_fc mlp.up 128x32",
        "mlp.c_proj mlp.down 32x128",
    ],
    "gpt_neox": [
        "attention.query_key_value attention.qkv 96x32",
        "attention.dense attention.o 32x32",
        "mlp.dense_h_to_4h mlp.up 48x32",
        "mlp.dense_4h_to_h mlp.down 32x48",
    ],
    "falcon": [
        "self_attention.query_key_value attention.qkv 48x32",
        "self_attention.dense attention.o 32x32",
        "mlp.dense_h_to_4h mlp.up 128x32",
        "mlp.dense_4h_to_h mlp.down 32x128",
    ],
    "mixtral": [
        *_QKVO,
        "mlp.gate.weight moe.router 4x32",
        "mlp.experts.gate_up_proj moe.experts.gate_up 4x96x32",
        "mlp.experts.down_proj moe.experts.down 4x32x48",
    ],
    "gpt_oss": [
        *_QKVO,
        "mlp.router.weight moe.router 4x32",
        "mlp.experts.gate_up_proj moe.experts.gate_up 4x96x32",
        "mlp.experts.down_proj moe.experts.down 4x32x48",
    ],
    "jamba": [
        *_QKVO,
        "feed_forward.router.weight moe.router 4x32",
        "feed_forward.experts.gate_up_proj moe.experts.gate_up 4x96x32",
        "feed_forward.experts.down_proj moe.experts.down 4x32x48",
    ],
    "mamba": [
        "mixer.conv1d mixer.conv 64x1x4",
        "mixer.in_proj mixer.in 128x32",
        "mixer.x_proj mixer.x 10x64",
        "mixer.dt_proj mixer.dt 64x2",
        "mixer.out_proj mixer.out 32x64",
    ],
    "qwen3_next": [
        "linear_attn.conv1d mixer.conv 48x1x4",
        "linear_attn.in_proj_qkvz mixer.in 64x32",
        "linear_attn.in_proj_ba mixer.ba 4x32",
        "linear_attn.out_proj mixer.out 32x16",
        "mlp.gate.weight moe.router 4x32",
        "mlp.experts.gate_up_proj moe.experts.gate_up 4x32x32",
        "mlp.experts.down_proj moe.experts.down 4x32x16",
        "mlp.shared_expert.gate_proj moe.shared.gate 16x32",
        "mlp.shared_expert.up_proj moe.shared.up 16x32",
        "mlp.shared_expert.down_proj moe.shared.down 32x16",
        "mlp.shared_expert_gate moe.shared.router 1x32",
    ],
    "bert": [
        "attention.self.query attention.q 32x32",
        "attention.self.key attention.k 32x32",
        "attention.self.value attention.v 32x32",
        "attention.output.dense attention.o 32x32",
        "intermediate.dense mlp.up 48x32",
        "output.dense mlp.down 32x48",
    ],
    "modernbert": [
        "attn.Wqkv attention.qkv 96x32",
        "attn.Wo attention.o 32x32",
        "mlp.Wi mlp.gate_up 96x32",
        "mlp.Wo mlp.down 32x48",
    ],
    "t5": [
        *(f"layer.0.SelfAttention.{x} attention.{x} 32x32" for x in "qkvo"),
        *(f"layer.1.EncDecAttention.{x} cross_attention.{x} 32x32" for x in "qkvo"),
        "layer.2.DenseReluDense.wi mlp.up 48x32",
        "layer.2.DenseReluDense.wo mlp.down 32x48",
    ],
    "nanogpt": [
        "attn.c_attn attention.qkv 96x32",
        "attn.c_proj attention.o 32x32",
        "mlp.c_fc mlp.up 48x32",
        "mlp.c_proj mlp.down 32x48",
    ],
}


@cache
def plain(name: str) -> tuple[nn.Module, LayerMap]:
    model = MODELS[name]()
    return model, layer_map(model)


def lora(model: nn.Module, name: str = "", **options) -> nn.Module:
    # PEFT refuses Mamba's out_proj, whose weight is read without calling the module
    modules = ["in_proj", "x_proj"] if name == "mamba" else "all-linear"
    return get_peft_model(model, LoraConfig(r=2, **{"target_modules": modules, **options}))  # type: ignore[arg-type]


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", MAPPED)
def test_stack_and_names(name):
    model, found = plain(name)
    stack, layers, per_layer = STACKS[name]
    assert (found.stack, len(found), len(found.layers[1].targets)) == (stack, layers, per_layer)
    for i, layer in enumerate(found.layers):
        assert (layer.index, layer.name) == (i, f"{stack}.{i}")
        assert layer.kind == type(find_module(model, layer.name)).__name__
        assert all(t.layer == i and t.name.startswith(f"{layer.name}.") for t in layer.targets)
    assert found.targets == tuple(t for layer in found.layers for t in layer.targets)
    assert len({t.name for t in found.targets}) == len(found.targets)
    assert len(found.fingerprint) == 64 and found.fingerprint == layer_map(model).fingerprint


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", some(sorted(MODELS), FAMILIES))
def test_models_train_a_step(name):
    model = MODELS[name]()
    loss = loss_of(name, model)
    loss.backward()
    assert ("labels" in batch(name, model)) is (name != "llama_bare")
    targets = [] if name == "albert" else layer_map(model).targets
    weights = [p for t in targets for p in find_module(model, t.name).parameters(recurse=False)]
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in weights)


@pytest.mark.parametrize("name", sorted(LAYER_1))
def test_targets_of_layer_1(name):
    layer = plain(name)[1].layers[1]
    seen = [f"{t.name[len(layer.name) + 1 :]} {t.role} {'x'.join(map(str, t.shape))}" for t in layer.targets]
    assert seen == LAYER_1[name]


@pytest.mark.parametrize("name", MAPPED)
def test_shapes_are_those_of_the_weights(name):
    model, found = plain(name)
    kinds = {"linear", "conv1d", "conv", "experts", "parameter"}
    for target in found.targets:
        module = find_module(model, target.name)
        leaf = target.name.rpartition(".")[2]
        weight = getattr(module, leaf if target.kind in ("experts", "parameter") else "weight")
        stored = list(weight.shape)
        if target.kind == "conv1d" or getattr(module, "is_transposed", False):
            stored[-2:] = stored[:-3:-1]
        assert target.kind in kinds and target.shape == tuple(stored), target
        assert target.params == prod(target.shape) == weight.numel()
        assert target.kind != "linear" or isinstance(module, nn.Linear)


@pytest.mark.parametrize("name", MAPPED)
def test_nothing_is_missing_or_counted_twice(name):
    model, found = plain(name)
    container = find_module(model, found.stack)
    assert sum(layer.params for layer in found.layers) == sum(p.numel() for p in container.parameters())
    linears = {id(m.weight) for m in container.modules() if isinstance(m, (nn.Linear, tf.pytorch_utils.Conv1D))}
    assert len([t for t in found.targets if t.kind in ("linear", "conv1d")]) == len(linears)
    stacked = {id(p) for n, p in container.named_parameters() if p.ndim == 3 and "experts" in n}
    assert len([t for t in found.targets if t.kind == "experts"]) == len(stacked)


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", some(MAPPED, FEW))
def test_meta_device_gives_the_same_map(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert next(model.parameters()).is_meta
    assert layer_map(model) == plain(name)[1]


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", some(MAPPED, FEW))
def test_lora_wrapped_gives_the_same_map(name):
    found = plain(name)[1]
    model = MODELS[name]()
    originals = {t.name: find_module(model, t.name) for t in found.targets}
    wrapped = lora(model, name)
    assert any("lora_A" in n for n, _ in wrapped.named_parameters())
    assert layer_map(wrapped) == found and layer_map(wrapped).fingerprint == found.fingerprint
    assert layer_map(wrapped.get_submodule("base_model")) == found and layer_map(model) == found
    assert all(find_module(wrapped, key) is module for key, module in originals.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_lora_on_experts_and_router_parameters(name):
    found = plain(name)[1]
    router = next(t.name for t in found.targets if t.kind == "parameter")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", router]
    wrapped = lora(MODELS[name](), target_modules=["q_proj"], target_parameters=parameters)
    assert any("experts.base_layer.lora_A" in n for n, _ in wrapped.named_parameters())
    assert layer_map(wrapped) == found
    experts = find_module(wrapped, "model.layers.1.mlp.experts")
    assert find_module(wrapped, "model.layers.1.mlp.experts.down_proj") is experts
    assert type(experts).__name__.endswith("Experts")


def test_other_peft_wrappers():
    found = plain("llama")[1]
    options: dict[str, Any] = {"modules_to_save": ["mlp", "lm_head"], "trainable_token_indices": [1, 2]}
    model = MODELS["llama"]()
    wrapped = lora(model, target_modules=["q_proj"], **options)
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))  # type: ignore[operator]
    assert layer_map(wrapped) == found
    assert type(find_module(wrapped, "model.layers.0.mlp.up_proj")) is nn.Linear
    assert type(find_module(wrapped, "model.embed_tokens")) is nn.Embedding
    assert base_of(wrapped) is model
    own = MODELS["llama"]()
    own.add_adapter(LoraConfig(r=2, target_modules=["up_proj"]))  # type: ignore[operator]
    assert layer_map(own) == found and base_of(own) is own


def test_compiled_and_data_parallel(tmp_path):
    found = plain("llama")[1]
    model = MODELS["llama"]()
    compiled = torch.compile(lora(model))
    assert layer_map(compiled) == found and base_of(compiled) is model  # type: ignore[arg-type]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(MODELS["llama"]())
        assert layer_map(parallel) == found
        assert base_of(parallel) is parallel.module
    finally:
        torch.distributed.destroy_process_group()
    by_block = MODELS["nanogpt"]()
    blocks = by_block.get_submodule("transformer.h")
    for i, block in enumerate(blocks.children()):
        blocks[i] = torch.compile(block)  # type: ignore[index]
    assert layer_map(by_block) == plain("nanogpt")[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_bases(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = MODELS["llama"]()
    for target in plain("llama")[1].targets:
        old = model.get_submodule(target.name)
        out, inner = target.shape
        new = bnb.nn.Linear4bit(inner, out, bias=False) if bits == 4 else bnb.nn.Linear8bitLt(inner, out, bias=False)
        new.weight.data = old.weight.data
        if bits == 8:
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        parent, _, leaf = target.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    model.to("cpu")
    if bits == 4:
        assert model.get_parameter("model.layers.0.mlp.up_proj.weight").shape == (48 * 32 // 2, 1)
    assert layer_map(model) == plain("llama")[1]
    assert layer_map(lora(model)) == plain("llama")[1]


def test_expert_layouts_that_the_module_does_not_tell():
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 9}
    shape |= {"num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    more: dict[str, Any] = {"intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 1}
    with torch.device("meta"):
        llama4 = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**shape, **more, num_attention_heads=4, pad_token_id=0))
        jetmoe = tf.JetMoeForCausalLM(tf.JetMoeConfig(**shape, kv_channels=8))
    assert llama4.get_parameter("model.layers.0.feed_forward.experts.gate_up_proj").shape == (4, 32, 96)
    seen = {t.name: (t.role, t.shape) for t in layer_map(llama4).layers[0].targets if t.kind == "experts"}
    assert seen == {
        "model.layers.0.feed_forward.experts.gate_up_proj": ("moe.experts.gate_up", (4, 96, 32)),
        "model.layers.0.feed_forward.experts.down_proj": ("moe.experts.down", (4, 32, 48)),
    }
    seen = {t.name: (t.role, t.shape) for t in layer_map(jetmoe).layers[1].targets}
    assert seen["model.layers.1.mlp.output_linear.weight"] == ("moe.experts.down", (4, 32, 48))
    assert seen["model.layers.1.mlp.input_linear.weight"] == ("moe.experts.gate_up", (4, 96, 32))


def test_shared_modules_are_listed_in_the_lowest_layer():
    found = plain("zamba2")[1]
    shared = [t.name for t in found.targets if "shared_transformer" in t.name]
    assert len(shared) == 10 and all(name.startswith("model.layers.1.") for name in shared)
    assert [layer.kind for layer in found.layers] == ["Zamba2MambaDecoderLayer", "Zamba2HybridLayer"] * 2
    assert [len(layer.targets) for layer in found.layers] == [3, 14, 3, 4]


@pytest.mark.parametrize(
    ("name", "stack", "path"),
    [
        ("t5", "encoder", "encoder.block"),
        ("t5", "decoder", "decoder.block"),
        ("t5", "encoder.block", "encoder.block"),
        ("bart", "encoder", "model.encoder.layers"),
        ("bart", "encoder=model.encoder.layers", "model.encoder.layers"),
        ("whisper", "encoder", "model.encoder.layers"),
        ("whisper", "audio", "model.encoder.layers"),
        ("whisper", "text", "model.decoder.layers"),
        ("gemma3_vlm", "vision", "model.vision_tower.encoder.layers"),
        ("gemma3_vlm", "text", "model.language_model.layers"),
        ("vit", "vision", "vit.layers"),
        ("opt", "decoder", "model.decoder.layers"),
    ],
)
def test_stack_by_name_or_path(name, stack, path):
    model, default = plain(name)
    found = layer_map(model, stack)
    assert found.stack == path and found.layers[0].name == f"{path}.0" and len(found) == 3
    assert (found.fingerprint == default.fingerprint) is (path == default.stack)


def test_all_stacks_are_listed():
    assert plain("t5")[1].stacks == ("encoder=encoder.block", "decoder=decoder.block")
    assert plain("whisper")[1].stacks == ("encoder=model.encoder.layers", "decoder=model.decoder.layers")
    towers = ("vision=model.vision_tower.encoder.layers", "text=model.language_model.layers")
    assert plain("gemma3_vlm")[1].stacks == towers
    assert plain("llama")[1].stacks == ("model.layers",)
    assert stack_labels(["qformer.encoder.layer", "language_model.layers"]) == [{"encoder", "vision"}, {"text"}]
