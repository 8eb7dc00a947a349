"""Models of a few layers whose weights are drawn by a seed, with the tokenizers and processors that belong to them.

What a checkpoint without a task would hold: an encoder has no head for one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerpeft.recipe.toys import pictures, sounds, words

WIDE, HEADS, RANGE = 64, 4, 0.1  # as wide as a block of a quantized matrix
TEXT = {"hidden_size": WIDE, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDE, "initializer_range": RANGE}
IMAGE = {**TEXT, "image_size": pictures.SIDE, "patch_size": 8}
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' + eos_token + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def tokenizer(special: Sequence[str], template: str | None, **names: str) -> Any:
    """A tokenizer of whole words, and of pieces for others; `special`: its first tokens; `template`: what stands around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    characters = sorted({*letters, *letters.upper(), *"0123456789.,:;?!'-&"})
    known = [*words.vocabulary(), *pictures.WORDS, *sounds.WORDS, "user", "assistant"]
    pieces = [*special, *known, *characters, *(f"##{c}" for c in characters)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    made: Any = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk_token"]))  # type: ignore[call-arg]
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    if template is not None:
        around = [(name, vocabulary[name]) for name in special if name in template]
        pair = template.replace("$A", "$A:0 {1} $B:1", 1).replace(
            "{1} ", f"{names['sep_token']} " if "sep_token" in names else ""
        )
        made.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=256, **names)


def bert(folder: Path) -> Any:
    import transformers

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    made = tokenizer(special, "[CLS] $A [SEP]", **names)
    made.save_pretrained(folder)
    config = transformers.BertConfig(
        **TEXT, num_hidden_layers=4, vocab_size=len(made), max_position_embeddings=256, pad_token_id=0
    )
    return transformers.BertForMaskedLM(config)


def t5(folder: Path) -> Any:
    import transformers

    special = ("<pad>", "</s>", "<unk>")
    made = tokenizer(special, "$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(made), d_model=WIDE, d_kv=WIDE // HEADS, d_ff=2 * WIDE, num_layers=3, num_decoder_layers=3, num_heads=HEADS,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit(folder: Path) -> Any:
    import transformers

    _image_processor().save_pretrained(folder)
    return transformers.ViTModel(transformers.ViTConfig(**IMAGE, num_hidden_layers=4), add_pooling_layer=False)


def _image_processor(kind: str = "ViT") -> Any:
    import transformers

    size = {"height": pictures.SIDE, "width": pictures.SIDE}
    named = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")
    more = {"size": size} if kind == "ViT" else {"size": {"shortest_edge": pictures.SIDE}, "crop_size": size}
    return named(**more)


def wav2vec2(folder: Path) -> Any:
    import transformers

    transformers.Wav2Vec2FeatureExtractor(sampling_rate=sounds.RATE, return_attention_mask=True).save_pretrained(folder)
    config = transformers.Wav2Vec2Config(
        **TEXT, num_hidden_layers=3, conv_dim=(32, 32, 32), conv_stride=(10, 8, 4), conv_kernel=(20, 8, 4),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer", do_stable_layer_norm=True,
        mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def whisper(folder: Path) -> Any:
    import transformers

    special = ("<|endoftext|>", "<|startoftranscript|>", "<|unk|>")
    end = {"eos_token": special[0], "pad_token": special[0], "bos_token": special[1], "unk_token": special[2]}
    made = tokenizer(special, "<|startoftranscript|> $A <|endoftext|>", **end)
    made.save_pretrained(folder)
    mels = {"feature_size": 40, "chunk_length": 2, "sampling_rate": sounds.RATE}
    transformers.WhisperFeatureExtractor(**mels).save_pretrained(folder)
    config = transformers.WhisperConfig(
        vocab_size=len(made), num_mel_bins=40, max_source_positions=100, max_target_positions=32, d_model=WIDE, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDE,
        decoder_ffn_dim=2 * WIDE, init_std=RANGE, pad_token_id=0, bos_token_id=1, eos_token_id=0, decoder_start_token_id=1,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def llava(folder: Path) -> Any:
    import transformers

    special = ("<pad>", "</s>", "<unk>", "<image>")
    made = tokenizer(special, None, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    transformers.LlavaProcessor(
        _image_processor("CLIP"), made, patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    text = transformers.LlamaConfig(**TEXT, num_hidden_layers=3, vocab_size=len(made), pad_token_id=0, eos_token_id=1)
    seen = transformers.CLIPVisionConfig(**IMAGE, num_hidden_layers=2)
    config = transformers.LlavaConfig(
        vision_config=seen, text_config=text, image_token_index=3, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "toy-bert": bert, "toy-t5": t5, "toy-vit": vit, "toy-wav2vec2": wav2vec2, "toy-whisper": whisper, "toy-llava": llava,
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Writes a model of this name, the same one always, with what it reads text, pictures or sounds by."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MAKERS[name](folder).save_pretrained(folder)
