"""A short run that leaves no trace: of LoRA on all targets, or of scales of heads; what trains hangs on hooks, not in the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layerpeft.errors import ScoreError
from layerpeft.integrations.losses import loss_of
from layerpeft.integrations.torch import eager
from layerpeft.model.evaluating import nothing_trains, to_model
from layerpeft.model.heads import columns, holder
from layerpeft.model.layers import Target, find_module
from layerpeft.selection.draws import seed_of
from layerpeft.selection.probe import Key, attach_taps

SPREAD = 1e-3  # of the normal values that scales begin with, as published
Step = list[tuple[str, torch.Tensor, torch.Tensor]]  # target, gradient of one of its factors, and how far it moved


@dataclass
class Factors:
    """A and B of every weight, made when it is first used. State is real here: they train."""

    rank: int
    seed: int
    held: dict[Key, tuple[nn.Parameter, ...]] = field(default_factory=dict)

    def attach(self, model: nn.Module, targets: Iterable[Target]) -> list[RemovableHandle]:
        """Puts them beside the targets."""
        return attach_taps(model, targets, self.tap)

    def penalty(self) -> torch.Tensor | float:
        """What is added to the loss."""
        return 0.0

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

    def _of(self, key: Key, y: torch.Tensor, x: torch.Tensor) -> tuple[nn.Parameter, ...]:
        if key not in self.held:
            generator = torch.Generator().manual_seed(seed_of(f"{self.seed}|{key[0]}|{key[1]}|trial"))
            a = (torch.rand(self.rank, x.shape[-1], generator=generator) * 2 - 1) / x.shape[-1] ** 0.5  # as PEFT begins
            self.held[key] = (
                nn.Parameter(a.to(x.device)),
                nn.Parameter(torch.zeros(y.shape[-1], self.rank).to(x.device)),
            )
        return self.held[key]


@dataclass
class Scales(Factors):
    """A vector A for every head, which multiplies what the head gives out by 1 + A, with `l1` Σ|A| added to the loss (LoFiT)."""

    l1: float = 0.0

    def attach(self, model: nn.Module, targets: Iterable[Target]) -> list[RemovableHandle]:
        """Before the projections that read the heads."""
        heads: dict[str, list[Target]] = {}
        for target in targets:
            heads.setdefault(holder(target.name), []).append(target)
        found = ((find_module(model, name), own) for name, own in heads.items())
        return [m.register_forward_pre_hook(eager(partial(self._scaled, own)), with_kwargs=True) for m, own in found]

    def penalty(self) -> torch.Tensor | float:
        return self.l1 * sum(scale.abs().sum() for (scale,) in self.held.values())

    def _scaled(self, own: list[Target], _: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        whole = torch.zeros(x.shape[-1], device=x.device)
        for target in own:
            (scale,) = self._scale(target, x.device)
            whole = whole.index_add(0, _places(target, x.device), scale)
        x = x + (x * whole).to(x.dtype)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"input": x})

    def _scale(self, target: Target, device: torch.device) -> tuple[nn.Parameter, ...]:
        key = (target.name, 0)
        if key not in self.held:
            generator = torch.Generator().manual_seed(seed_of(f"{self.seed}|{target.name}|scale"))
            begin = torch.randn(target.shape[1], generator=generator) * SPREAD
            self.held[key] = (nn.Parameter(begin.to(device)),)
        return self.held[key]


def _places(target: Target, device: torch.device) -> torch.Tensor:
    where = columns(target.name, target.shape[1])
    return torch.arange(where.start, where.stop, device=device)


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
    l1: float | None = None,
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Trains LoRA (alpha = rank, A as PEFT begins it, B = 0) on all targets by AdamW, a step a batch, again and again over them.

    `l1`: scales of heads in its place, with this penalty, by a learning rate that falls to 0 in a line, without weight decay.
    `see` hears of every step after it; returned is what was trained, by target. Weights, gradients, modes, hooks and random
    states are as they were afterwards.
    Raises: ScoreError where a batch has no loss, or none that is finite.
    """
    factors = Factors(rank, seed) if l1 is None else Scales(rank, seed, l1=l1)
    optimizer: torch.optim.Optimizer | None = None
    with ExitStack() as stack:
        stack.enter_context(nothing_trains(model))
        for handle in factors.attach(model, targets):
            stack.callback(handle.remove)
        for step in range(steps):
            with torch.enable_grad():
                loss = loss_of(model(**to_model(model, batches[step % len(batches)])))
            if loss is None or not bool(torch.isfinite(loss.mean())):
                raise ScoreError("the model returned no loss, or none that is finite: the batches need labels")
            (loss.mean() + factors.penalty()).backward()
            optimizer = _with(optimizer, [p for pair in factors.held.values() for p in pair], lr, l1 is None)
            for group in optimizer.param_groups if l1 is not None else ():
                group["lr"] = lr * (1 - step / steps)
            named = [(key[0], p, p.detach().clone()) for key, pair in factors.held.items() for p in pair]
            optimizer.step()
            see([(name, p.grad, p.detach() - was) for name, p, was in named if p.grad is not None])
            optimizer.zero_grad()
    return {name: tuple(p.detach() for p in held) for (name, _), held in factors.held.items()}


def _with(
    optimizer: torch.optim.Optimizer | None, tensors: list[nn.Parameter], lr: float, decays: bool
) -> torch.optim.Optimizer:
    """The optimizer with all of these: a batch may be the first that comes to an expert."""
    if optimizer is None:
        return torch.optim.AdamW(tensors, lr, weight_decay=1e-2 if decays else 0.0)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if fresh := [p for p in tensors if id(p) not in known]:
        optimizer.add_param_group({"params": fresh})
    return optimizer
