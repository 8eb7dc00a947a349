"""Tiny random models, one per architecture that the layer map must know, with a batch for each. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 100, 32, 48, 3, 4
IMAGE_TOKEN = 97

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    **_IDS,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 28,
    "patch_size": 14,
}
_SEQ2SEQ = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "vocab_size": VOCAB,
    **_IDS,
    "decoder_start_token_id": 1,
}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_ZAMBA = {
    "num_hidden_layers": 4,
    "mamba_d_state": 8,
    "mamba_headdim": 16,
    "n_mamba_heads": 4,
    "mamba_ngroups": 1,
    "num_mem_blocks": 1,
    "adapter_rank": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
}
_JAMBA = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
}


def _seeded(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(**options).train()


def _hf(model: str, config: str, **options: Any) -> Callable[..., nn.Module]:
    """A builder of a transformers model by the names of its classes; a fresh config every time, with what is asked besides."""
    return partial(_seeded, lambda **more: getattr(tf, model)(getattr(tf, config)(**options | more)))


def _causal(family: str, **options: Any) -> Callable[..., nn.Module]:
    return _hf(f"{family}ForCausalLM", f"{family}Config", **options)


def _classifier(family: str, **options: Any) -> Callable[..., nn.Module]:
    return _hf(f"{family}ForSequenceClassification", f"{family}Config", num_labels=3, **options)


@dataclass
class NanoOutput:
    """What the hand-written model returns; indexable by name as PEFT's and Trainer's users do."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class NanoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.c_proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1)]
        y = nn.functional.scaled_dot_product_attention(*split, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(HIDDEN, INNER)
        self.c_proj = nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(HIDDEN)
        self.attn = NanoAttention()
        self.ln_2 = nn.LayerNorm(HIDDEN)
        self.mlp = NanoMLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Hand-written in the manner of nanoGPT: no config, no transformers class, blocks in a ModuleDict's ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "wpe": nn.Embedding(64, HIDDEN),
                "h": nn.ModuleList([NanoBlock() for _ in range(LAYERS)]),
                "ln_f": nn.LayerNorm(HIDDEN),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> NanoOutput:
        parts = self.transformer
        x = parts["wte"](input_ids) + parts["wpe"](torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in parts["h"].children():
            x = block(x)
        logits = self.lm_head(parts["ln_f"](x))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return NanoOutput(loss, logits)


class Moody(NanoGPT):
    """Does one thing or another, as its tokens say: no trace can follow."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> NanoOutput:
        return super().forward(input_ids if input_ids.sum() > 0 else input_ids + 1, labels)


_CAUSAL: dict[str, Callable[..., nn.Module]] = {
    "llama": _causal("Llama", **_DECODER),
    "mistral": _causal("Mistral", **_DECODER),
    "qwen2": _causal("Qwen2", **_DECODER),
    "qwen3": _causal("Qwen3", **_DECODER, head_dim=8),
    "gemma2": _causal("Gemma2", **_DECODER, head_dim=8),
    "gemma3_text": _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=8),
    "phi3": _causal("Phi3", **_DECODER),
    "olmo2": _causal("Olmo2", **_DECODER),
    "granite": _causal("Granite", **_DECODER),
    "starcoder2": _causal("Starcoder2", **_DECODER),
    "gpt2": _hf("GPT2LMHeadModel", "GPT2Config", n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB, **_IDS),
    "gpt_neox": _causal("GPTNeoX", **_ENCODER),
    "opt": _causal(
        "OPT",
        hidden_size=HIDDEN,
        ffn_dim=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCAB,
        word_embed_proj_dim=HIDDEN,
        max_position_embeddings=64,
        **_IDS,
    ),
    "bloom": _causal("Bloom", hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB, **_IDS),
    "falcon": _causal(
        "Falcon", hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCAB, **_IDS
    ),
    "mixtral": _causal("Mixtral", **_DECODER, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _causal("Qwen3Moe", **_DECODER, **_MOE, head_dim=8),
    "qwen2_moe": _causal("Qwen2Moe", **_DECODER, **_MOE, shared_expert_intermediate_size=16),
    "gpt_oss": _causal("GptOss", **_DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "mamba": _causal("Mamba", hidden_size=HIDDEN, num_hidden_layers=LAYERS, vocab_size=VOCAB, state_size=4, **_IDS),
    "jamba": _causal("Jamba", **_DECODER, **_JAMBA),
    "qwen3_next": _causal("Qwen3Next", **_DECODER, **_MOE, **_LINEAR_ATTENTION, head_dim=8),
    "zamba2": _causal("Zamba2", **{**_DECODER, **_ZAMBA}),
    "nanogpt": partial(_seeded, NanoGPT),
}
_CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "bert": _classifier("Bert", **_ENCODER),
    "roberta": _classifier("Roberta", **_ENCODER),
    "distilbert": _classifier(
        "DistilBert", dim=HIDDEN, hidden_dim=INNER, n_layers=LAYERS, n_heads=HEADS, vocab_size=VOCAB, pad_token_id=0
    ),
    # the settings of DeBERTa-v3
    "deberta_v2": _classifier(
        "DebertaV2",
        **_ENCODER,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    ),
    "modernbert": _classifier("ModernBert", **_ENCODER, cls_token_id=1, sep_token_id=2),
    "albert": _classifier("Albert", **_ENCODER, embedding_size=16),
}
_SEQUENCE: dict[str, Callable[..., nn.Module]] = {
    "t5": _hf(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=HIDDEN,
        d_ff=INNER,
        d_kv=8,
        num_layers=LAYERS,
        num_heads=HEADS,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
    ),
    "bart": _hf("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ, max_position_embeddings=64),
}
_IMAGES: dict[str, Callable[..., nn.Module]] = {
    "vit": _hf("ViTForImageClassification", "ViTConfig", **_VISION, num_labels=3),
    "dinov2": _hf("Dinov2ForImageClassification", "Dinov2Config", **_VISION, num_labels=3),
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    **_CAUSAL,
    **_CLASSIFIERS,
    **_SEQUENCE,
    **_IMAGES,
    "llama_bare": _hf("LlamaModel", "LlamaConfig", **_DECODER),
    "whisper": _hf(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **_SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
    ),
    "gemma3_vlm": _hf(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config={**_DECODER, "head_dim": 8},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=98,
        eoi_token_index=99,
    ),
}


# one of each kind: what others share with one of these, they repeat
FAMILIES = {"llama", "phi3", "gemma2", "gpt2", "opt", "falcon", "mixtral", "qwen2_moe", "gpt_oss", "mamba", "jamba"}
FAMILIES |= {"qwen3_next", "zamba2", "nanogpt", "llama_bare", "bert", "modernbert", "albert", "t5", "bart", "whisper"}
FAMILIES |= {"vit", "gemma3_vlm"}


def batch(name: str, model: nn.Module, rows: int = 2, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch on the model's device, with labels (`llama_bare` has no loss of its own: use `loss_of`)."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, length), generator=draw)
    classes = torch.randint(0, 3, (rows,), generator=draw)
    if name in _IMAGES:
        made = {"pixel_values": torch.randn(rows, 3, 28, 28, generator=draw), "labels": classes}
    elif name in _CLASSIFIERS:
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": classes}
    elif name == "whisper":
        made = {"input_features": torch.randn(rows, 8, 32, generator=draw), "labels": ids}
    elif name == "gemma3_vlm":
        ids[:, 1:5] = IMAGE_TOKEN
        image = (ids == IMAGE_TOKEN).long()
        pixels = torch.randn(rows, 3, 28, 28, generator=draw)
        labels = ids.masked_fill(image.bool(), -100)
        made = {"input_ids": ids, "token_type_ids": image, "pixel_values": pixels, "labels": labels}
    elif name == "llama_bare":
        made = {"input_ids": ids}
    else:
        made = {"input_ids": ids, "labels": ids}
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in made.items()}


def loss_of(name: str, model: nn.Module, **options: Any) -> torch.Tensor:
    """Loss of one forward pass on `batch(name, model, **options)`."""
    out = model(**batch(name, model, **options))
    loss = getattr(out, "loss", None)
    return out.last_hidden_state.float().pow(2).mean() if loss is None else loss
