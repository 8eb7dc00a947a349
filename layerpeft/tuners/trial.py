"""A short run of LoRA on all targets that leaves no trace: its factors hang on taps, and are nowhere in the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.integrations.losses import loss_of
from layerpeft.model.evaluating import nothing_trains, to_model
from layerpeft.model.layers import Target
from layerpeft.selection.draws import seed_of
from layerpeft.selection.probe import Key, attach_taps

Step = list[tuple[str, torch.Tensor, torch.Tensor]]  # target, gradient of one of its factors, and how far it moved


@dataclass
class Factors:
    """A and B of every weight, made when it is first used. State is real here: they train."""

    rank: int
    seed: int
    held: dict[Key, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    def tap(self, y: torch.Tensor, x: torch.Tensor, keys: Mapping[Key, Any]) -> torch.Tensor:
        """`y` (…, out) and what the factors of x (…, in) add to it; `keys` says which rows go through which weight."""
        for key, rows in keys.items():
            a, b = self._of(key, y, x)
            if rows is None:
                y = y + ((x.to(a.dtype) @ a.T) @ b.T).to(y.dtype)
            else:
                flat = y.reshape(-1, y.shape[-1])
                places = torch.arange(len(flat), device=y.device)[rows]
                added = (x.reshape(-1, x.shape[-1])[rows].to(a.dtype) @ a.T) @ b.T
                y = flat.index_add(0, places, added.to(y.dtype)).view_as(y)
        return y

    def _of(self, key: Key, y: torch.Tensor, x: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        if key not in self.held:
            generator = torch.Generator().manual_seed(seed_of(f"{self.seed}|{key[0]}|{key[1]}|trial"))
            a = (torch.rand(self.rank, x.shape[-1], generator=generator) * 2 - 1) / x.shape[-1] ** 0.5  # as PEFT begins
            self.held[key] = (
                nn.Parameter(a.to(x.device)),
                nn.Parameter(torch.zeros(y.shape[-1], self.rank).to(x.device)),
            )
        return self.held[key]


def run_steps(
    model: nn.Module,
    targets: Iterable[Target],
    batches: Sequence[Mapping[str, Any]],
    see: Callable[[Step], None],
    *,
    steps: int,
    rank: int = 8,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Trains LoRA (alpha = rank, A as PEFT begins it, B = 0) on all targets by AdamW, a step a batch, again and again over them.

    `see` hears of every step after it. Weights, gradients, modes, hooks and random states are as they were afterwards.
    Raises: ScoreError where a batch has no loss, or none that is finite.
    """
    factors = Factors(rank, seed)
    optimizer: torch.optim.Optimizer | None = None
    with ExitStack() as stack:
        stack.enter_context(nothing_trains(model))
        for handle in attach_taps(model, targets, lambda y, x, keys: factors.tap(y, x, keys)):
            stack.callback(handle.remove)
        for step in range(steps):
            with torch.enable_grad():
                loss = loss_of(model(**to_model(model, batches[step % len(batches)])))
            if loss is None or not bool(torch.isfinite(loss.mean())):
                raise ScoreError("the model returned no loss, or none that is finite: the batches need labels")
            loss.mean().backward()
            optimizer = _with(optimizer, [p for pair in factors.held.values() for p in pair], lr)
            named = [(key[0], p, p.detach().clone()) for key, pair in factors.held.items() for p in pair]
            optimizer.step()
            see([(name, p.grad, p.detach() - was) for name, p, was in named if p.grad is not None])
            optimizer.zero_grad()


def _with(optimizer: torch.optim.Optimizer | None, tensors: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimizer with all of these: a batch may be the first that comes to an expert."""
    if optimizer is None:
        return torch.optim.AdamW(tensors, lr)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if fresh := [p for p in tensors if id(p) not in known]:
        optimizer.add_param_group({"params": fresh})
    return optimizer
