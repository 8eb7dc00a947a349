"""What a model gives out, compared between two ways of running it: which numbers, of which tokens, and how far they lie apart."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from layerpeft.errors import NothingSeenError, ScoreError
from layerpeft.integrations.losses import DIVIDING, IGNORED
from layerpeft.integrations.torch import widest
from layerpeft.model.layers import base_of

ROWS = 64  # tokens whose distributions are compared at a time, in float64
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of (rows, numbers) twice, the sum over rows


def compared(
    run: Callable[[], Any],
    model: nn.Module,
    inputs: Mapping[str, Any],
    changes: Sequence[Callable[[], AbstractContextManager[Any]]],
    distance: Distance,
    read: Callable[[Any], torch.Tensor],
    tick: Callable[[], Any] = lambda: None,
) -> tuple[list[float], int]:
    """Of one batch: how far each change moves what is `read` off the output, summed over the tokens that count, and how many
    those are.

    `run` gives the model's output on `inputs`, and again inside of each change; it is to be called in evaluation mode.
    """
    numbers = read(run())
    counted = counted_tokens(model, inputs, numbers)
    before = numbers[counted]
    del numbers
    found = []
    for change in changes:
        with change():
            after = read(run())[counted]
        found.append(summed(distance, before, after))
        tick()
    return found, before.shape[0]


def summed(distance: Distance, before: torch.Tensor, after: torch.Tensor) -> float:
    """The distance summed over rows, some of them in float64 at a time."""
    wide = widest(before.device)
    total = torch.zeros((), dtype=wide, device=before.device)
    for start in range(0, before.shape[0], ROWS):
        total += distance(before[start : start + ROWS].to(wide), after[start : start + ROWS].to(wide))
    return float(total)


def kl(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Σ over rows of Σ p · (log p - log q), p and q the softmax of (rows, classes) logits."""
    p, q = torch.log_softmax(before, -1), torch.log_softmax(after, -1)
    return (p.exp() * (p - q)).sum()


def per_token(sums: Sequence[float], tokens: float, what: str = "output KL") -> list[float]:
    """The means. Raises: NothingSeenError where no token counts."""
    if not tokens:
        raise NothingSeenError(f"{what}: no token counts, since all labels are ignored or all of the input is padding")
    return [s / tokens for s in sums]


def counted_tokens(model: nn.Module, inputs: Mapping[str, Any], numbers: torch.Tensor) -> torch.Tensor:
    """Which distributions count, as booleans of the logits' shape without the last dimension.

    With labels for each token, those that predict one (a causal model's predict the next token's); else those not masked.
    """
    places = numbers.shape[:-1]
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if isinstance(labels, torch.Tensor) and labels.shape == places and len(places) > 1:
        return _ahead(labels != IGNORED, model).to(numbers.device)
    if isinstance(mask, torch.Tensor) and mask.shape == places:
        return (mask != 0).to(numbers.device)
    return torch.ones(places, dtype=torch.bool, device=numbers.device)


def logits_of(output: Any, what: str = "output KL") -> torch.Tensor:
    """The logits in a model's output. Raises: ScoreError where there are none."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple):
        found = next((t for t in output if isinstance(t, torch.Tensor) and t.dim() > 1), None)
    if not isinstance(found, torch.Tensor) or found.dim() < 2:
        raise ScoreError(
            f"{what} compares the distributions that a model gives out, and this one's output holds no logits "
            f"({type(output).__name__}); load it with a head, and without fused losses"
        )
    return found


def _ahead(labelled: torch.Tensor, model: nn.Module) -> torch.Tensor:
    base = base_of(model)
    aligned = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    loss = getattr(getattr(base, "loss_function", None), "__name__", "")
    if aligned or DIVIDING.get(loss, 1) == 0:
        return labelled
    return torch.cat([labelled[..., 1:], torch.zeros_like(labelled[..., :1])], -1)
