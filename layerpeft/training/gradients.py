"""Norms of what trains, layer by layer, before anything clips them: seen where each gradient has just been added up."""

from collections.abc import Sequence
from functools import partial

import torch

from layerpeft.integrations import trainer
from layerpeft.model.names import lying_in
from layerpeft.training.method import Tensors


class GradientNorms:
    """Watches the trained tensors in layers (or smaller units), by their names. State is real here: hooks, until `close`.

    The norms are those of this process (before DDP takes the mean), in the unit of the loss as it was scaled.
    """

    def __init__(self, layers: Sequence[str], tensors: Tensors) -> None:
        names = [lying_in([name]) for name in layers]
        self._squares: dict[int, dict[str, torch.Tensor]] = {i: {} for i in range(len(names))}
        self._handles = []
        for target, group in tensors.items():
            for parts in (self._squares[i] for i, inside in enumerate(names) if inside(target)):
                for name, parameter in group.items():
                    if parameter.requires_grad:
                        see = partial(_see, parts, f"{target}|{name}")
                        self._handles.append(parameter.register_post_accumulate_grad_hook(see))

    def take(self) -> dict[int, float]:
        """Layer -> norm of its gradient in the last update step; then forgets."""
        found = {i: float(sum(parts.values())) ** 0.5 for i, parts in self._squares.items() if parts}
        for parts in self._squares.values():
            parts.clear()
        return found

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


def _see(parts: dict[str, torch.Tensor], name: str, parameter: torch.Tensor) -> None:
    if parameter.grad is not None and trainer.last_micro_batch():
        parts[name] = parameter.grad.detach().float().square().sum().cpu()
