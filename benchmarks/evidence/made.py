"""The models that are made here: shapes of transformers, pre-trained for some thousand steps on books in the public domain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tqdm import trange
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from benchmarks.evidence.design import Design, Source
from benchmarks.healing import share_of_rate
from layerpeft.errors import ConfigError
from layerpeft.recipe import shipped

MASKED = 0.15  # of the tokens, as BERT has it (arXiv 1810.04805); all of them become the mask
DONE = "config.json"


def folder() -> Path:
    """Where models lie that are made here."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "layerpeft-evidence"


def find(name: str, models: Path) -> Path:
    """The folder of a model. Raises: ConfigError where it is not made yet."""
    if not (models / name / DONE).is_file():
        raise ConfigError(f"{name} is not made yet: python -m benchmarks.evidence pretrain {name} --data DIR")
    return models / name


def pieces(tokenizer: Any, path: Path, length: int, count: int | None = None) -> list[tuple[int, ...]]:
    """The text of a file as rows of so many tokens; the first `count`, from as much text as they need."""
    text = path.read_text(encoding="utf-8")
    if count is not None:
        text = text[: 8 * count * length]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = [tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    return found[:count]


def pretrain(design: Design, name: str, data: Path, models: Path) -> Path:
    """Makes a model of the design: its folder. The same seed makes the same weights on the same machine."""
    source = design.models[name]
    if source.made is None:
        raise ConfigError(f"{name} ships; it is not made here")
    tokenizer: Any = AutoTokenizer.from_pretrained(shipped.resolve(f"{shipped.SCHEME}llama-6m"))
    if source.made == "bert":
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(source.seed)
    model = _shape(source, tokenizer).train()
    rows = torch.tensor(pieces(tokenizer, data / design.pretraining.text, source.length))
    optimizer = torch.optim.AdamW(model.parameters(), source.lr, weight_decay=0.01)
    draw = torch.Generator().manual_seed(source.seed)
    bar = trange(source.steps, desc=f"making {name}")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = source.lr * share_of_rate(step, source.steps, part=20)
        batch = rows[torch.randint(0, len(rows), (source.rows,), generator=draw)]
        loss = model(**inputs(source, batch, tokenizer, draw)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    tokenizer.save_pretrained(models / name)
    model.save_pretrained(models / name)
    return models / name


def inputs(source: Source, ids: torch.Tensor, tokenizer: Any, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """What the model learns of rows (rows, tokens): the next token, or those that are hidden."""
    if source.made != "bert":
        return {"input_ids": ids, "labels": ids}
    hidden = torch.rand(ids.shape, generator=draw) < MASKED
    return {"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id), "labels": ids.masked_fill(~hidden, -100)}


def _shape(source: Source, tokenizer: Any) -> Any:
    vocabulary = len(tokenizer)
    if source.made == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=vocabulary, hidden_size=source.width, num_hidden_layers=source.layers,
                num_attention_heads=source.heads, intermediate_size=source.mlp, max_position_embeddings=512,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=source.width, n_layer=source.layers, n_head=source.heads, n_inner=source.mlp,
            n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
