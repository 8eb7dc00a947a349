"""The file of an adapter in llama.cpp itself, as the package xllamacpp has it (`pip install xllamacpp`; skipped without)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.using.export.export import export
from layerpeft.using.export.limits import LAYOUTS
from tests.helpers.loops import llama
from tests.helpers.models import MODELS

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf", reason="without gguf")
llama_cpp: Any = pytest.importorskip("xllamacpp", reason="without xllamacpp")

WORDS = 320
IDS = [1, 270, 300, 261, 319, 290, 275, 10, 40]
SIZES = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As conversion/llama.py turns q and k of a base."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_base(model: Any, path: Path) -> None:
    """The base as a GGUF file in float32, as llama.cpp's converter would write it, with a vocabulary of nothing that is read."""
    config, layout = model.config, LAYOUTS[type(model).__name__]
    writer = gguf.GGUFWriter(path, layout.name)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    size = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(WORDS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    # bytes are what its tokenizer falls back to; those that begin a letter would be held back, so none of them is one here
    texts = [f"<0x{i:02X}>" for i in range(256)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *texts, *map(str, range(WORDS - 259))])
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([2, 3, 3, *[1] * (WORDS - 3)])
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[layout.name], 4)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        own = heads.get(name.split(".")[-2]) if layout.turned else None
        tensor = turned(tensor, own) if own else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def said_by(base: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token after these, by llama.cpp."""
    params = llama_cpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.cpuparams.n_threads = (
        256,
        1,
        0,
        False,
        1,
    )
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which is of 16 bit
    if adapter is not None:
        params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    asked = {"prompt": ids, "max_tokens": 1, "logprobs": WORDS, "temperature": -1.0}
    server = llama_cpp.Server(params)
    answer = server.handle_completions(asked)["choices"][0]["logprobs"]
    found = torch.full((WORDS,), float("nan"))
    for entry in answer["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_says_what_plain_peft_says(name, tmp_path):
    kind = type(llama() if name == "llama" else MODELS[name]())
    config: PretrainedConfig = kind.config_class(**SIZES, **({"head_dim": 16} if name != "qwen2" else {}))
    torch.manual_seed(0)
    base = kind(config).float()
    for tensor in base.parameters():
        if tensor.dim() == 2:
            torch.nn.init.normal_(tensor, std=0.15)
    base.lm_head.weight.data[2] = 0.0  # never the likeliest: a text that ends has no log-probabilities
    base.save_pretrained(tmp_path / "base")
    write_base(base, tmp_path / "base.gguf")
    options = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True}
    config_of = LayerLoraConfig(
        select="last:3", r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config_of).eval()
    draw = torch.Generator().manual_seed(3)
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.data += 0.2 * torch.randn(tensor.shape, generator=draw)
    model.save_pretrained(str(tmp_path / "a"))
    adapter = export(str(tmp_path / "a"), "gguf").folder / "adapter.gguf"
    for last in (301, 299):
        ids = [*IDS, last]
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            with model.disable_adapter():
                before = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert torch.allclose(said_by(tmp_path / "base.gguf", None, ids), before, atol=1e-4)
        assert torch.allclose(said_by(tmp_path / "base.gguf", adapter, ids), wanted, atol=1e-4)
        assert not torch.allclose(before, wanted, atol=1.0)
