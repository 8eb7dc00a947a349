"""The models that are made here: shapes of transformers, pre-trained for some thousand steps on books in the public domain.

An encoder does not leave the entropy of single words by hidden tokens alone in so few steps. So it tells the next token under a
causal mask at first; then it sees both sides, and tells hidden tokens from the place before them (arXiv 2404.05961).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tqdm import trange
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, ModernBertConfig, ModernBertForMaskedLM

from benchmarks.evidence.design import Design, Source
from benchmarks.healing import share_of_rate
from layerpeft.errors import ConfigError
from layerpeft.recipe import shipped

MASKED = 0.25  # of the tokens of an encoder's text
CAUSAL = 0.75  # of the steps of an encoder, in which it sees one side alone
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
    if source.made == "modernbert":
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
        one_side = source.made == "modernbert" and step < CAUSAL * source.steps
        loss = model(**(_from_one_side(batch) if one_side else inputs(source, batch, tokenizer, draw))).loss
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
    if source.made != "modernbert":
        return {"input_ids": ids, "labels": ids}
    hidden = torch.rand(ids.shape, generator=draw) < MASKED
    told = _one_before(ids.masked_fill(~hidden, -100))
    return {"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id), "labels": told}


def _from_one_side(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, length = ids.shape
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
    return {"input_ids": ids, "attention_mask": mask, "labels": _one_before(ids)}


def _one_before(labels: torch.Tensor) -> torch.Tensor:
    """Labels (rows, tokens) where the place before theirs tells them."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def _shape(source: Source, tokenizer: Any) -> Any:
    vocabulary = len(tokenizer)
    if source.made == "modernbert":
        end = tokenizer.eos_token_id
        return ModernBertForMaskedLM(
            ModernBertConfig(
                vocab_size=vocabulary, hidden_size=source.width, num_hidden_layers=source.layers,
                num_attention_heads=source.heads, intermediate_size=source.mlp, max_position_embeddings=512,
                global_attn_every_n_layers=1, classifier_pooling="mean", pad_token_id=tokenizer.pad_token_id,
                bos_token_id=end, eos_token_id=end, cls_token_id=end, sep_token_id=end,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=source.width, n_layer=source.layers, n_head=source.heads, n_inner=source.mlp,
            n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
