"""An adapter and its base model as one full model on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpeft import save
from layerpeft.errors import SaveError

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "chat_template.jinja")


def merge(
    folder: str | os.PathLike[str], into: str | os.PathLike[str], model: nn.Module | None = None, **kwargs: Any
) -> Path:
    """Writes the base model with the adapter of `folder` merged into its weights, in their dtype, and the tokenizer beside it.

    `model`: the base, where the adapter does not say where it is; `kwargs` go to PEFT's `from_pretrained`. The target folder must
    be empty or new. Raises: SaveError for a damaged adapter, a base that does not fit, or a folder that holds something.
    """
    target = Path(into)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SaveError(f"{target} is not empty: name a new folder for the merged model")
    loaded: Any = save.load(folder, model, **kwargs)
    quantized = [n for n, p in loaded.named_parameters() if not p.is_floating_point()]
    if quantized:
        raise SaveError(
            f"the base is quantized ({len(quantized)} weights, such as {quantized[0]}), and merging would round what was trained; "
            "give the base in 16 bit: merge(folder, into, model=AutoModelForCausalLM.from_pretrained(…))"
        )
    with torch.no_grad():
        merged: Any = loaded.merge_and_unload(safe_merge=True)
    merged.save_pretrained(target)
    for name in (n for n in TOKENIZER if (Path(folder) / n).is_file()):
        (target / name).write_bytes((Path(folder) / name).read_bytes())
    return target
