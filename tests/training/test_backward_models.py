"""The cut in encoder-decoder, speech, vision-language and hybrid models: nothing below is computed, no stack is starved."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack
from functools import partial

import peft
import pytest
import torch
import transformers as tf

from layerpeft import LayerLoraConfig, get_peft_model, layer_map
from layerpeft.training import backward
from tests.helpers.models import HEADS, HIDDEN, INNER, LAYERS, MODELS, VOCAB, loss_of
from tests.helpers.traffic import watched

_HALVES = {"text_config": {"num_hidden_layers": LAYERS, "vocab_size": VOCAB}, "vision_config": {"depth": LAYERS}}


def qwen2_vl():
    """Tiny; one image of 4 x 4 patches becomes 4 tokens."""
    text = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}, **_HALVES["text_config"]}
    vision = {
        "embed_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "patch_size": 4,
        **_HALVES["vision_config"],
    }
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=97, vision_start_token_id=98)
    torch.manual_seed(0)
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen2_vl_loss(model):
    ids = torch.tensor([[5, 98, 97, 97, 97, 97, 6, 7]])
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    types = (ids == 97).long()
    grid = torch.tensor([[1, 4, 4]])
    return model(input_ids=ids, labels=ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=types).loss


def mt5():
    """T5 of the gated kind; under checkpointing its cross-attention makes a position bias that requires a gradient."""
    sizes = {"d_model": HIDDEN, "d_ff": INNER, "d_kv": 8, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCAB}
    torch.manual_seed(0)
    return tf.MT5ForConditionalGeneration(tf.MT5Config(**sizes, decoder_start_token_id=0))


def hubert():
    """Its convolutions make the sound itself require a gradient."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    still = {"layerdrop": 0.0, "mask_time_prob": 0.0, "num_labels": 3}
    torch.manual_seed(0)
    return tf.HubertForSequenceClassification(tf.HubertConfig(**sizes, **convolutions, **positions, **still))


def hubert_loss(model):
    sound = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    return model(input_values=sound, labels=torch.tensor([0, 2])).loss


ARCHITECTURES = {name: (MODELS[name], partial(loss_of, name)) for name in MODELS}
ARCHITECTURES |= {
    "qwen2_vl": (qwen2_vl, qwen2_vl_loss),
    "mt5": (mt5, partial(loss_of, "t5")),
    "hubert": (hubert, hubert_loss),
}
REFUSED = {"mamba": ("out_proj",), "qwen3_next": ("gate_proj", "up_proj", "down_proj")}  # by PEFT itself
KINDS = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}
WITHOUT, TOP, ALL = "000", "001", "111"


def run(name, stacks, make, kind, layers=(2,)):
    """(per stack: gradients that arrived and recomputations; gradients; where the chosen stack stops) of one step."""
    build, loss = ARCHITECTURES[name]
    base = build()
    found = [
        t for s in stacks for t in layer_map(base, s).targets if t.layer in layers and t.kind in ("linear", "conv1d")
    ]
    names = [t.name for t in found if t.name.rpartition(".")[2] not in REFUSED.get(name, ())]
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, lora_dropout=0.1)
    model = make(base, config).train()
    if KINDS[kind] is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])
    model.enable_input_require_grads()
    with ExitStack() as watching, warnings.catch_warnings():
        if make is get_peft_model:
            warnings.filterwarnings("error", message="None of the inputs have requires_grad")
        paths = [text.rpartition("=")[2] for text in layer_map(model).stacks]
        seen = [watching.enter_context(watched(model, path)) for path in paths]
        torch.manual_seed(7)
        loss(model).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return [(s.text("reached"), s.text("recomputed")) for s in seen], grads, backward.where(model, stacks[0])


TWO = [
    # trained, then the gradients that arrive in the first and in the second stack
    (("decoder",), WITHOUT, TOP),
    (("encoder",), TOP, ALL),
    (("encoder", "decoder"), TOP, ALL),
]
CASES = [(name, *row) for name in ("t5", "mt5", "bart", "whisper") for row in TWO]
CASES += [
    (name, tuple({"decoder": "text", "encoder": "vision"}[s] for s in stacks), *reached)
    for name in ("gemma3_vlm", "qwen2_vl")
    for stacks, *reached in TWO
]
CASES += [(name, (None,), TOP) for name in ("jamba", "qwen3_next", "mamba", "gpt2", "opt", "bert", "modernbert", "vit")]
CASES += [("hubert", ("hubert.encoder.layers",), "00", TOP), ("zamba2", (None,), "0011")]


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join([c[0], *map(str, c[1])]))
def test_every_stack_is_cut_at_its_own_lowest_layer_and_none_is_starved(case, kind):
    name, stacks, *reached = case
    found, mine, stop = run(name, stacks, get_peft_model, kind)
    none = ["0" * len(r) for r in reached]
    assert found == list(zip(reached, none if kind == "none" else reached, strict=True))
    plain, theirs, _ = run(name, stacks, peft.get_peft_model, kind)
    assert [r for r, _ in plain] == ["1" * len(r) for r in reached]
    assert mine.keys() == theirs.keys() and stop.layer == 2
    for tensor, grad in mine.items():  # a routed expert may have had no token; then neither has plain PEFT's
        assert (grad is None) == (theirs[tensor] is None), tensor
        assert grad is None or torch.equal(grad, theirs[tensor]), tensor


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gemma3_vlm", "qwen2_vl"])
def test_a_frozen_tower_in_front_of_layers_that_all_train_is_left_out(name, kind):
    found, mine, stop = run(name, ("text",), get_peft_model, kind, (0, 1, 2))
    assert [reached for reached, _ in found] == [WITHOUT, ALL] and stop.why == "the first layer trains"
    _, theirs, _ = run(name, ("text",), peft.get_peft_model, kind, (0, 1, 2))
    assert mine.keys() == theirs.keys() and all(torch.equal(g, theirs[n]) for n, g in mine.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_between_the_stacks_is_reached(kind):
    build, loss = ARCHITECTURES["gemma3_vlm"]
    found = []
    for make in (get_peft_model, peft.get_peft_model):
        base = build()
        names = [t.name for t in layer_map(base).targets if t.layer == 2]
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=names, modules_to_save=["multi_modal_projector"])
        model = make(base, config).train()
        if KINDS[kind] is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])
        model.enable_input_require_grads()
        with watched(model) as text, watched(model, "vision") as vision:
            torch.manual_seed(7)
            loss(model).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        reached = (vision.text("reached"), text.text("reached"))
        assert reached == ((WITHOUT if make is get_peft_model else ALL), ALL)
        assert "multi_modal_projector" in backward.where(model).why
    assert all(g is not None and torch.equal(g, found[1][n]) for n, g in found[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_selecting_in_one_stack_by_name(kind):
    for stack, reached in (("encoder", (TOP, ALL)), ("decoder", (WITHOUT, TOP))):
        build, loss = ARCHITECTURES["whisper"]
        model = get_peft_model(
            build(), LayerLoraConfig(select={"layers": "last:1", "stack": stack}, target_modules="all-linear")
        ).train()
        if KINDS[kind] is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])
        model.enable_input_require_grads()
        with watched(model, "encoder") as encoder, watched(model, "decoder") as decoder:
            loss(model).backward()
        assert (encoder.text("reached"), decoder.text("reached")) == reached
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None for p in trained)


def test_flags_that_let_gradients_in_are_given_back():
    base = mt5()
    names = [t.name for t in layer_map(base, "decoder").targets if t.layer == 2]
    model = get_peft_model(base, peft.LoraConfig(target_modules=names)).train()
    attention = base.decoder.block[0].layer[1].EncDecAttention
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not attention.gradient_checkpointing and base.decoder.block[0].gradient_checkpointing
    first = base.decoder.block[0].layer[2].layer_norm.weight.requires_grad_(True)
    norm = base.encoder.block[0].layer[0].layer_norm.weight.requires_grad_(True)
    loss_of("t5", model)
    assert attention.gradient_checkpointing
    for parameter in (first, norm):
        parameter.requires_grad_(False)
    loss_of("t5", model)
    assert not attention.gradient_checkpointing
    twin = copy.deepcopy(model)  # whose flags are its own
    inner = twin.get_base_model()
    for layer in (inner.decoder.block[0].layer[2], inner.encoder.block[0].layer[0]):
        layer.layer_norm.weight.requires_grad_(True)
    loss_of("t5", twin)
    given_back = inner.decoder.block[0].layer[1].EncDecAttention.gradient_checkpointing
    assert given_back and not attention.gradient_checkpointing
    model.gradient_checkpointing_disable()
    first.requires_grad_(True), norm.requires_grad_(True)
    loss_of("t5", model)
    assert not attention.gradient_checkpointing  # the user has turned it off meanwhile
    heard = hubert()
    names = [t.name for t in layer_map(heard).targets if t.layer == 2]
    model = get_peft_model(heard, peft.LoraConfig(target_modules=names, modules_to_save=["feature_extractor"])).train()
    convolutions = [m for m in heard.modules() if "_requires_grad" in m.__dict__]
    hubert_loss(model).backward()
    assert any(m._requires_grad for m in convolutions)  # they train
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
