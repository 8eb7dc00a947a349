"""What servers take, as data, with the version and the source that each was read from. No code of theirs is needed to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TARGETS = ("vllm", "gguf", "ollama", "merged")


@dataclass(frozen=True)
class Limits:
    """What one server takes of an adapter. `architectures`: classes of transformers whose adapters it takes; `ranks`: the values
    that its largest rank may have, none where any may be; `saved`: modules that may be saved whole; `joined`: linears that it
    keeps as one."""

    name: str
    version: str
    sources: tuple[str, ...]
    architectures: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    saved: tuple[str, ...] = ()
    joined: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Layout:
    """An architecture in llama.cpp's files. `turned`: rows of q and k stand in the order in which pairs that are rotated together
    lie beside each other (`permute` in conversion/llama.py), where transformers has them in halves."""

    name: str
    turned: bool = False


# After these starts PEFT loads a saved adapter as it stands. The others (pissa, olora, corda, loftq) change the base when it is
# loaded, which no server does. (vllm/lora/peft_helper.py, `_init_is_supported`)
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

VLLM = Limits(
    name="vLLM",
    version="0.30.0, and main of November 2026",
    sources=(
        # MaxLoRARanks, the values of --max-lora-rank
        "https://github.com/vllm-project/vllm/blob/01230b40128e570a58e54e75f7e55c4d5cd9246d/vllm/config/lora.py",
        # modules_to_save, DoRA, biases, starts: PEFTHelper._validate_features
        "https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py",
        # 0.30.0 multiplies every module by lora_alpha / r, whatever rank_pattern and alpha_pattern say; later ones go by those
        "https://github.com/vllm-project/vllm/issues/59799",
        # the column LoRA
        "https://github.com/vllm-project/vllm/blob/4b387bcbd88dceb37549f8af3da3586f9a3c92f4/docs/models/supported_models.md",
        # packed_modules_mapping
        "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/llama.py",
    ),
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    saved=("classifier", "score"),
    joined=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    architectures=(
        "BambaForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
        "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconH1ForCausalLM", "GPTBigCodeForCausalLM",
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "GlmForCausalLM",
        "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM",
        "GraniteMoeSharedForCausalLM", "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "JambaForCausalLM",
        "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM",
        "NemotronForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "Phi3ForCausalLM",
        "PhiForCausalLM", "PhimoeForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM",
    ),
)  # fmt: skip

# conversion/<family>.py of llama.cpp: the name in `model_arch`, and whether `undo_permute` holds
LAYOUTS: Mapping[str, Layout] = {
    "LlamaForCausalLM": Layout("llama", turned=True),
    "MistralForCausalLM": Layout("llama", turned=True),
    "GraniteForCausalLM": Layout("granite", turned=True),
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3"),
    "GemmaForCausalLM": Layout("gemma"),
    "Gemma2ForCausalLM": Layout("gemma2"),
    "Gemma3ForCausalLM": Layout("gemma3"),
    "Phi3ForCausalLM": Layout("phi3"),
    "Starcoder2ForCausalLM": Layout("starcoder2"),
}

LLAMA_CPP = Limits(
    name="llama.cpp",
    version="master of November 2026, gguf 0.19",
    sources=(
        # what an adapter's file holds
        "https://github.com/ggml-org/llama.cpp/blob/0b03adaa632b76c7651dd1f6fa3b7a0b5eda479c/convert_lora_to_gguf.py",
        # permute, undo_permute
        "https://github.com/ggml-org/llama.cpp/blob/0274f0fc7d7fbab69c33ccf757cf7f3d036c17aa/conversion/llama.py",
        # get_scale: every tensor is multiplied by adapter.lora.alpha / its own rank
        "https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.h",
    ),
    architectures=tuple(LAYOUTS),
)

# Of folders of safetensors that Ollama imports: https://docs.ollama.com/import, November 2026
OLLAMA_FOLDERS = (
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)  # fmt: skip

# Classes of whole models that vLLM serves, by how the name ends, and the words that its command then takes besides
# (docs/models/supported_models.md: "you should explicitly specify `--runner pooling`")
VLLM_KINDS: Mapping[str, tuple[str, ...]] = {
    "CausalLM": (),
    "ConditionalGeneration": (),
    "ImageTextToText": (),
    "SpeechSeq2Seq": (),
    "SequenceClassification": ("--runner", "pooling"),
    "TokenClassification": ("--runner", "pooling"),
    "AutoModel": ("--runner", "pooling"),
}
