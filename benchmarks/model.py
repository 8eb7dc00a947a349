"""The models and batches of the cases: shapes with random weights, and the small pre-trained Llama that ships."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpeft.errors import Problems, unknown
from layerpeft.recipe import shipped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What makes a Llama of that size; the two large ones as published (7B: arXiv 2307.09288, 8B: arXiv 2407.21783).
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2x32": dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, heads=(4, 2)),
    "llama-4x64": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=4, heads=(4, 4)),
    "llama-12x64": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=12, heads=(4, 4)),
    "llama-12x384": dict(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, heads=(6, 6)),
    "llama-12x512": dict(vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, heads=(8, 8)),
    "llama-1x2048": dict(vocab_size=256, hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, heads=(16, 16)),
    "llama-32x64": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=32, heads=(4, 4)),
    "llama-2-7b": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, heads=(32, 32)
    ),
    "llama-3-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, heads=(32, 8)
    ),
}
LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@dataclass(frozen=True)
class Model:
    """Either a `shape` with random weights, or `shipped`: a folder of weights inside the package."""

    shape: str | None = None
    shipped: str | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.shape or self.shipped}, {self.dtype}"


@dataclass(frozen=True)
class Batch:
    """`rows` of `length` tokens; `text: gsm8k` takes real rows with padding, otherwise tokens are random."""

    rows: int
    length: int
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.rows} × {self.length} {'GSM8K' if self.text else 'random'} tokens"


def check(model: Model, batch: Batch, problems: Problems) -> None:
    """Adds what is wrong with a model and its batch."""
    if (model.shape is None) == (model.shipped is None):
        problems.add("model: give one of shape and shipped")
    if model.shape is not None and model.shape not in SHAPES:
        problems.add(f"model.shape: {unknown('shape', model.shape, SHAPES)}")
    if model.shipped is not None and model.shipped not in shipped.data_names():
        problems.add(f"model.shipped: {unknown('model', model.shipped, shipped.data_names())}")
    if model.dtype not in DTYPES:
        problems.add(f"model.dtype: {unknown('dtype', model.dtype, DTYPES)}")
    if batch.text not in (None, "gsm8k"):
        problems.add(f"batch.text: {unknown('text', batch.text, ['gsm8k'])}")
    if batch.text is not None and model.shipped is None:
        problems.add("batch.text: real text needs a model with a tokenizer (model.shipped)")


def build(model: Model, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The model on that device; random weights are made there."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if model.shipped is not None:
        found: Any = AutoModelForCausalLM.from_pretrained(folder(model), dtype=DTYPES[model.dtype])
        found.config.use_cache = False
        return found.to(device)
    shape = dict(SHAPES[str(model.shape)])
    heads, key_heads = shape.pop("heads")
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=key_heads, use_cache=False)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype])


def num_layers(model: nn.Module) -> int:
    """How many layers a transformers model has."""
    return int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def folder(model: Model) -> Path:
    """Where a shipped model lies."""
    return Path(shipped.resolve(f"{shipped.SCHEME}{model.shipped}"))


def batches(model: Model, batch: Batch, vocabulary: int, *, count: int = 1, seed: int = 0, device: str = "cpu") -> list:
    """`count` batches of model inputs with labels, the same for the same seed."""
    if batch.text is not None:
        return [{k: v.to(device) for k, v in b.items()} for b in _text(model, batch, count)]
    draw = torch.Generator().manual_seed(seed)
    size = (batch.rows, batch.length)
    ids = [torch.randint(0, vocabulary, size, generator=draw).to(device) for _ in range(count)]
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


def _text(model: Model, batch: Batch, count: int) -> list[dict[str, torch.Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder(model))
    lines = Path(shipped.resolve(f"{shipped.SCHEME}gsm8k_train.jsonl")).read_text(encoding="utf-8").splitlines()
    texts = [" ".join(map(str, json.loads(line).values())) for line in lines[: count * batch.rows]]
    found = []
    for start in range(0, len(texts), batch.rows):
        rows = texts[start : start + batch.rows]
        coded = tokenizer(rows, return_tensors="pt", padding="max_length", truncation=True, max_length=batch.length)
        ids, mask = coded["input_ids"], coded["attention_mask"]
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found
