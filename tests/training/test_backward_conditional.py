"""The cut where what trains need not run: batches without images or sound, an encoder whose output is given."""

import warnings

import peft
import pytest
import torch
import transformers as tf

import layerpeft
from layerpeft import LayerLoraConfig, get_peft_model, layer_map
from layerpeft.errors import TrainingError
from tests.helpers.models import HEADS, HIDDEN, INNER, LAYERS, MODELS, VOCAB
from tests.training.test_backward_models import KINDS, qwen2_vl

WORDS = torch.arange(3, 11)[None]
TEXT = {"input_ids": WORDS, "labels": WORDS}
_IDS = torch.tensor([[5, 98, 97, 97, 97, 97, 6, 7]])
_GRID = torch.tensor([[1, 4, 4]])


def qwen3_vl():
    """Tiny; its vision tower hands features to the first layers of the text from half way up, too."""
    text = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    text |= {"head_dim": 8, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    vision = {"depth": LAYERS, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_heads": HEADS, "patch_size": 4}
    vision |= {"out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    torch.manual_seed(0)
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=97, vision_start_token_id=98)
    return tf.Qwen3VLForConditionalGeneration(config)


def picture(size):
    patches = torch.randn(16, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": _IDS, "labels": _IDS, "pixel_values": patches, "image_grid_thw": _GRID,
            "mm_token_type_ids": (_IDS == 97).long()}  # fmt: skip


def qwen2_audio():
    """Tiny; a sound of 12 frames becomes 3 tokens."""
    text = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    text |= {"num_hidden_layers": LAYERS, "vocab_size": VOCAB, "model_type": "qwen2"}
    sound = {"num_mel_bins": 8, "encoder_layers": LAYERS, "encoder_attention_heads": HEADS, "encoder_ffn_dim": INNER}
    sound |= {"d_model": HIDDEN, "max_source_positions": 6, "model_type": "qwen2_audio_encoder"}
    torch.manual_seed(0)
    config = tf.Qwen2AudioConfig(audio_config=sound, text_config=text, audio_token_index=97)
    return tf.Qwen2AudioForConditionalGeneration(config)


def sound():
    features = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 97, 97, 97, 6, 7]])
    return {
        "input_ids": ids,
        "labels": ids,
        "input_features": features,
        "feature_attention_mask": torch.ones(1, 12).long(),
    }


def encoded():
    """The encoder's output is there by now; nothing of the encoder runs."""
    state = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    return {"encoder_outputs": (state,), "labels": WORDS}


TOWERS = {
    "qwen2_vl": (qwen2_vl, "vision", picture(3 * 2 * 4 * 4), TEXT),
    "qwen3_vl": (qwen3_vl, "vision", picture(3 * 2 * 4 * 4), TEXT),
    "qwen2_audio": (qwen2_audio, "audio", sound(), TEXT),
    "t5": (MODELS["t5"], "encoder", {"input_ids": WORDS, "labels": WORDS}, encoded()),
    "bart": (MODELS["bart"], "encoder", {"input_ids": WORDS, "labels": WORDS}, encoded()),
}


def train(name, kind, batches, config):
    """(trained tensors after a step on each batch, whose gradients came in each step) under TRL's defaults."""
    build, stack, with_it, without = TOWERS[name]
    base = build()
    targets = [t.name for t in layer_map(base, stack).targets if t.layer == 2 and t.kind == "linear"]
    torch.manual_seed(5)
    if config == "ours":
        given = LayerLoraConfig(select={"layers": [2], "stack": stack}, r=2, target_modules="all-linear")
    else:
        given = peft.LoraConfig(r=2, target_modules=targets)
    wrap = peft.get_peft_model if config == "plain" else get_peft_model
    model = wrap(base, given).train()
    if KINDS[kind] is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    seen = []
    with warnings.catch_warnings():
        if config != "plain":
            warnings.filterwarnings("error", message="None of the inputs have requires_grad")
        for batch in batches:
            torch.manual_seed(7)
            model(**(with_it if batch == "with" else without)).loss.backward()
            seen.append({n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad})
            optimizer.step()
            optimizer.zero_grad()
    if config == "ours":
        layerpeft.check_trained(model)
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, seen


CASES = [(name, "non-reentrant") for name in TOWERS] + [
    ("qwen3_vl", "none"),
    ("qwen3_vl", "reentrant"),
    ("t5", "reentrant"),
]


@pytest.mark.spread(2)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_batch_that_leaves_out_what_trains_is_a_step_that_does_nothing(name, kind, caplog):
    caplog.set_level("INFO")
    order = ("without", "with", "without", "with")
    # reentrant checkpointing of plain PEFT starves a tower whose input requires no gradient
    want, theirs = train(name, "non-reentrant" if (name, kind) == ("qwen3_vl", "reentrant") else kind, order, "plain")
    for config in ("stock", "ours"):
        found, mine = train(name, kind, order, config)
        assert mine == theirs and [any(step.values()) for step in mine] == [False, True, False, True]
        assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want), config
    assert caplog.text.count("shows nothing") == 1 and "optimizer step 1 shows nothing" in caplog.text


def test_a_run_without_the_stack_that_was_chosen_ends():
    with pytest.raises(TrainingError, match="all 2 optimizer steps had no gradient but zero"):
        train("qwen2_audio", "none", ("without", "without"), "ours")
