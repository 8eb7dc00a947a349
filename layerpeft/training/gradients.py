"""Norms of what trains, layer by layer, before anything clips them: seen where each gradient has just been added up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from layerpeft.integrations import trainer
from layerpeft.model.layers import layer_map

Tensors = Mapping[str, Mapping[str, nn.Parameter]]  # target -> the adapter's tensors in it


def watch_gradients(model: nn.Module, stack: str | None, tensors: Tensors) -> GradientNorms:
    """Watches the layers of one stack."""
    names = [f"{layer.name}." for layer in layer_map(model, stack).layers]
    layer_of = {t: i for t in tensors for i, name in enumerate(names) if t.startswith(name)}
    return GradientNorms(tensors, layer_of)


class GradientNorms:
    """Watches the trained tensors of some layers. State is real here: hooks on the tensors, until `close`.

    The norms are those of this process (before DDP takes the mean), in the unit of the loss as it was scaled.
    """

    def __init__(self, tensors: Tensors, layer_of: Mapping[str, int]) -> None:
        self._squares: dict[int, dict[str, torch.Tensor]] = {}
        self._handles = []
        for target, group in tensors.items():
            for name, parameter in group.items():
                if target in layer_of and parameter.requires_grad:
                    see = _Seer(self._squares.setdefault(layer_of[target], {}), f"{target}|{name}")
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


class _Seer:
    def __init__(self, parts: dict[str, torch.Tensor], name: str) -> None:
        self.parts, self.name = parts, name

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and trainer.last_micro_batch():
            self.parts[self.name] = parameter.grad.detach().float().square().sum().cpu()
