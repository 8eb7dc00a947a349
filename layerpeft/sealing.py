"""What the weights of a model were when they were wrapped and before the first update, written down as checksums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from torch import nn

from layerpeft import verify
from layerpeft.integrations import distributed
from layerpeft.projection import originals

WRAPPERS = ("base_layer", "_orig_mod", "original_module")
Seals = dict[str, verify.Seal]


def clean(name: str) -> str:
    """A module's name in the unwrapped model."""
    return ".".join(p for p in name.split(".") if p not in WRAPPERS)


class Sealed:
    """The seals of one adapter's model. State is real here: what things were, before anything trained."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.frozen: Seals = {}  # what no layer of the adapter trains
        self.others: Seals = {}  # what trains besides it
        self.start: dict[str, Seals] = {}  # the adapter's own tensors, by target
        self._beside: Set[str] = set()  # adapters there were when the weights were written down

    def wrapped(self, model: nn.Module) -> None:
        """Just after wrapping, when all that may ever train requires a gradient.

        Packed weights, which the first forward pass may lay out anew, are left for the first step.
        """
        self.frozen = {
            n: verify.seal(p) for n, p in self._frozen_now(model, frozenset()).items() if p.is_floating_point()
        }
        self._beside = self._adapters(model)

    def begin(self, model: nn.Module, tensors: verify.Parameters, others: Iterable[str]) -> None:
        """Just before the first update."""
        now, own = self.parameters(model), verify.ids_of(tensors)
        gone = verify.outdated(self.frozen, now)
        self.frozen = {n: s for n, s in self.frozen.items() if n not in gone}
        self.frozen |= {n: verify.seal(p) for n, p in self._frozen_now(model, own).items() if n not in self.frozen}
        self.others = {clean(n): verify.seal(now[clean(n)]) for n in others}
        self.start = {t: {n: verify.seal(p) for n, p in group.items()} for t, group in tensors.items()}

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Forgets what these frozen weights were (None: all of them), because they change for a good reason."""
        for name in list(self.frozen if names is None else names):
            self.frozen.pop(name, None)

    def parameters(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """All parameters, by names that wrapping and unwrapping does not change."""
        return {clean(n): p for n, p in model.named_parameters()} | originals(model, self.adapter)

    def changed_since_wrapping(self, model: nn.Module) -> list[str]:
        """Faults for frozen weights that are no more what they were."""
        if distributed.world_size() > 1 or self._adapters(model) != self._beside:
            self.forget()  # some ways of starting another adapter take something out of the weights
        return [
            f"{n} is frozen and changed after the model was wrapped; wrap it when its weights are what they should be"
            for n in verify.changed(self.frozen, self.parameters(model))
        ]

    def changed(self, now: Mapping[str, torch.Tensor]) -> list[str]:
        """Frozen weights that moved since."""
        return verify.changed(self.frozen, now)

    def still(self, now: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What trains besides the adapter and has not moved."""
        moved = {*verify.changed(self.others, now), *verify.outdated(self.others, now)}
        return {n: now[n] for n in self.others if n not in moved}

    def _frozen_now(self, model: nn.Module, own: Set[int]) -> dict[str, torch.Tensor]:
        found = self.parameters(model).items()
        return {n: p for n, p in found if not p.requires_grad and ".lora_" not in n and id(p) not in own}

    def _adapters(self, model: nn.Module) -> set[str]:
        return {self.adapter, *(getattr(model, "peft_config", None) or {})}
