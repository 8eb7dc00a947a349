"""An adapter and its base model as one full model on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from layerpeft import save
from layerpeft.errors import SaveError

MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "chat_template.jinja", "labels.json",
)  # fmt: skip


def merge(
    folder: str | os.PathLike[str],
    into: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Path:
    """Writes the base model with the adapter of `folder` merged into its weights, in their dtype, and the tokenizer beside it.

    `model`, or `base`, its folder or name: where the adapter does not say where it is; `dtype`: of the weights, the base's own
    without it; `kwargs` go to `from_pretrained`. The target folder must be empty or new, and is written last, at once.
    Raises: SaveError for a damaged adapter, a base that does not fit or is quantized, or a folder that holds something.
    """
    target = Path(into)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SaveError(f"{target} is not empty: name a new folder for the merged model")
    if model is None and dtype is not None:
        kwargs["dtype"] = dtype
    labels = Path(folder) / "labels.json"  # a recipe's classes
    if model is None and labels.is_file():
        kwargs.setdefault("num_labels", len(json.loads(labels.read_text(encoding="utf-8"))))
    if model is None and base is not None:
        model, kwargs = _base(folder, base, kwargs), {}
    loaded: Any = save.load(folder, model, **kwargs)
    quantized = [n for n, p in loaded.named_parameters() if not p.is_floating_point()]
    if quantized:
        raise SaveError(
            f"the base is quantized ({len(quantized)} weights, such as {quantized[0]}), and merging would round what was trained; "
            "give the base in 16 bit: merge(folder, into, model=AutoModelForCausalLM.from_pretrained(…))"
        )
    with torch.no_grad():
        merged: Any = loaded.merge_and_unload(safe_merge=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    for name in (n for n in BESIDE if (Path(folder) / n).is_file()):
        shutil.copyfile(Path(folder) / name, partial / name)
    if target.is_dir():
        target.rmdir()
    partial.rename(target)
    return target


def _base(folder: str | os.PathLike[str], base: str | os.PathLike[str], kwargs: dict[str, Any]) -> nn.Module:
    save.read_manifest(folder)
    task = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    if task not in MODELS:
        raise SaveError(
            f"{folder} has task_type {task!r}, without a model class; give the model itself: merge(…, model)"
        )
    try:
        return getattr(transformers, MODELS[task]).from_pretrained(os.fspath(base), **kwargs)
    except (OSError, ValueError) as error:
        raise SaveError(f"the base model {os.fspath(base)!r} cannot be loaded: {error}") from error
