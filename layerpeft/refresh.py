"""When projected modules get a new basis, and from what: around the optimizer's steps, without any trainer's help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from layerpeft import subspace
from layerpeft.integrations import distributed
from layerpeft.layers import Target, layer_map
from layerpeft.notes import note
from layerpeft.probe import attach_taps, tapped
from layerpeft.projected import (
    Projection,
    basis_of,
    fixed_of,
    fold,
    projections,
    rotate,
    set_basis,
    state_of,
    trained_of,
    unscale,
)

OVERLAP_GROWS_TO = 16  # an adaptive gap becomes at most so many times the one asked for


@dataclass(frozen=True)
class Refreshing:
    """How bases are renewed; the fields are those of `LayerGaloreConfig`."""

    gap: int
    subspace: str
    basis: str
    moments: str
    stagger: bool
    oversample: int
    gap_overlap: float | None


class Refresher:
    """Renews the bases of one adapter's projected modules. State is real here: taps are on modules whose refresh is due."""

    def __init__(self, how: Refreshing, stack: str | None) -> None:
        self.how, self.stack = how, stack
        self._sums: dict[str, torch.Tensor] = {}  # of the running step: ΩᵀG, GΩ, or G itself
        self._omegas: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._targets: dict[str, Target] = {}
        self._anchor: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Refresher:
        return Refresher(self.how, self.stack)

    def arm(self, model: nn.Module, adapter: str) -> None:
        """Puts taps on the modules whose next step gives them a basis; called before a forward pass, and after every step."""
        self.disarm()
        layers = dict(projections(model, adapter))
        self._spread([state_of(layer) for layer in layers.values()])
        for layer in layers.values():
            unscale(layer)
        due = [n for n, layer in layers.items() if state_of(layer).steps >= state_of(layer).due]
        if not due or self.how.subspace == "random":
            return
        if not set(due) <= set(self._targets):
            self._targets = {t.name: t for t in layer_map(model, self.stack).targets}
        for name in due:
            self._handles += attach_taps(model, [self._targets[name]], self._tap_for(layers[name]))

    def disarm(self) -> None:
        """Takes the taps off and forgets what they saw."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums, self._omegas = [], {}, {}

    def restart(self) -> None:
        """Forgets what a step saw that a loss scaler skipped; the taps stay for the next."""
        self._sums = {}

    def before_step(self, model: nn.Module, adapter: str, optimizer: Optimizer, held: set[int]) -> None:
        """Exact subspaces serve the very step whose gradient they come from, as in the reference."""
        if self.how.subspace != "svd":
            return
        for name, layer in self._due(model, adapter, held):
            gradient = self._gathered(name)
            if gradient is None:
                continue
            grad = trained_of(layer).grad
            if grad is None:
                continue
            clipped = _factor(grad, _projected(gradient, layer))
            if self._renew(layer, gradient, optimizer):
                grad.copy_((clipped * _projected(gradient, layer)).to(grad.dtype))

    def after_step(self, model: nn.Module, adapter: str, optimizer: Optimizer, held: set[int]) -> None:
        """Sketched and random subspaces serve from the next step on."""
        for name, layer in self._due(model, adapter, held) if self.how.subspace != "svd" else ():
            found = None if self.how.subspace == "random" else self._gathered(name)
            if self.how.subspace == "random" or found is not None:
                self._renew(layer, found, optimizer)
        for _, layer in projections(model, adapter):
            if id(trained_of(layer)) in held:
                state_of(layer).steps += 1
        self.arm(model, adapter)

    def _due(self, model: nn.Module, adapter: str, held: set[int]) -> list[tuple[str, Any]]:
        return [
            (n, layer)
            for n, layer in projections(model, adapter)
            if id(trained_of(layer)) in held and state_of(layer).steps >= state_of(layer).due
        ]

    def _renew(self, layer: Any, seen: torch.Tensor | None, optimizer: Optimizer) -> bool:
        """A new basis, the old period folded away; False where nothing usable was found, and the old basis stays."""
        state, old = state_of(layer), basis_of(layer)
        rank = old.shape[0]
        if seen is None:
            new = subspace.random_basis(f"{state.key}|{state.refreshes}", rank, old.shape[1], old)
        else:
            new = subspace.strongest(seen, rank, state.side)
        if new is None:
            state.failed += 1
            state.due = state.steps + 1
            note(f"{state.name}: no new subspace was found ({state.failed} so far); it goes on in the old one")
            return False
        new = new.to(old)
        state.overlap = subspace.overlap(new, old)
        self._adapt(state)
        if self.how.basis == "aligned" and state.refreshes:
            new = subspace.aligned(new, old)
        fold(layer)
        rotate(old.clone(), new, optimizer.state.get(trained_of(layer), {}), state.side, self.how.moments)
        set_basis(layer, new)
        state.refreshes += 1
        state.due = state.steps + (state.gap if state.refreshes > 1 else state.first_gap)
        return True

    def _adapt(self, state: Projection) -> None:
        """Doubles the gap of a module whose subspace stays where it is (the idea of Q-GaLore, arXiv 2407.08296)."""
        if self.how.gap_overlap is not None and state.refreshes and state.overlap is not None:
            most = OVERLAP_GROWS_TO * self.how.gap
            state.gap = min(2 * state.gap, most) if state.overlap >= self.how.gap_overlap else self.how.gap

    def _spread(self, states: list[Projection]) -> None:
        """Lets the second refreshes, and so all later ones, fall on steps that are spread over the gap."""
        for number, state in enumerate(states):
            state.first_gap = number * state.gap // len(states) or state.gap if self.how.stagger else state.gap

    def _gathered(self, name: str) -> torch.Tensor | None:
        found = self._sums.pop(name, None)
        if distributed.world_size() == 1:
            return found
        if not distributed.everywhere(found is not None):
            return None
        assert found is not None
        return distributed.add_up(found).to(found.device)

    def _tap_for(self, layer: Any) -> Any:
        def tap(y: torch.Tensor, x: torch.Tensor, _keys: Mapping[Any, Any]) -> torch.Tensor:
            if not torch.is_grad_enabled() or not layer.training or layer.disable_adapters or not y.is_floating_point():
                return y
            if self._anchor is None or self._anchor.device != y.device:
                self._anchor = torch.zeros((), device=y.device, requires_grad=True)
            return tapped(y, x, self._anchor, lambda gy, xs: self._see(layer, gy, xs))

        return tap

    def _see(self, layer: Any, gy: torch.Tensor, x: torch.Tensor) -> None:
        """Adds one call's share: `ΩᵀG` (k, in), `GΩ` (out, k), or G (out, in) for an exact subspace."""
        state = state_of(layer)
        gy, x = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1]).to(gy.dtype)
        if self.how.subspace == "svd":
            part = gy.T @ x
        else:
            omega = self._omega(layer, state).to(gy.dtype)
            part = (gy @ omega).T @ x if state.side == "right" else gy.T @ (x @ omega)
        part = part if part.dtype == torch.float64 else part.float()
        self._sums[state.name] = self._sums[state.name] + part if state.name in self._sums else part

    def _omega(self, layer: Any, state: Projection) -> torch.Tensor:
        if state.name not in self._omegas:
            trained = trained_of(layer).detach()
            warm = trained if state.side == "right" else trained.T
            key = f"{state.key}|sketch {state.refreshes}"
            self._omegas[state.name] = subspace.sketching_matrix(key, warm, self.how.oversample)
        return self._omegas[state.name]


def _projected(gradient: torch.Tensor, layer: Any) -> torch.Tensor:
    """The gradient of the trained factor, from the whole gradient: `G Qᵀ`, or `Pᵀ G`."""
    fixed = fixed_of(layer).detach().to(gradient.dtype)
    return gradient @ fixed.T if state_of(layer).side == "right" else fixed.T @ gradient


def _factor(grad: torch.Tensor, unclipped: torch.Tensor) -> float:
    """By what a clipped or unscaled gradient differs from what the taps saw; 1 within rounding."""
    whole = float(unclipped.double().square().sum())
    factor = float((grad.double() * unclipped.double()).sum()) / whole if whole else 1.0
    return factor if abs(factor - 1.0) > 1e-4 else 1.0
