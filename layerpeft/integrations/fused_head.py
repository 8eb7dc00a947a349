"""TRL's language-model head, which takes the loss in tiles and never forms the logits; with it SFT, DPO and GRPO train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def add_head(model: nn.Module) -> None:
    """Gives a causal language model the head that SFTTrainer gives it; called with `fused_lm_head=True` it is used."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # type: ignore[arg-type]


@contextmanager
def in_place() -> Iterator[None]:
    """Counts the head as on an accelerator, whose kernels fold a tile in place; elsewhere torch makes float32 copies of it."""
    from trl.kernels import chunked_logprob

    kept = chunked_logprob._forward_tile, chunked_logprob._backward_tile
    chunked_logprob._forward_tile = chunked_logprob._backward_tile = _fold  # type: ignore[assignment]
    try:
        yield
    finally:
        chunked_logprob._forward_tile, chunked_logprob._backward_tile = kept


def _fold(*_: Any, **__: Any) -> None:
    """A kernel that makes nothing."""
