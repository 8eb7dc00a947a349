"""When projected modules get a new basis, and from what: around the optimizer's steps, without any trainer's help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from layerpeft.errors import TrainingError
from layerpeft.integrations import distributed
from layerpeft.selection.probe import tapped
from layerpeft.text import note
from layerpeft.tuners.galore import subspace
from layerpeft.tuners.galore.optimizers import Row, check
from layerpeft.tuners.galore.projection import (
    Projection,
    Slot,
    at,
    basis_of,
    fold,
    like_trained,
    projections,
    refuse_part,
    rotate,
    set_basis,
    state_of,
    trained_of,
    unscale,
    wide,
)

# optimizers that look at a tensor as one matrix, while that of experts holds as many as there are experts
MATRIX_WISE = ("Muon", "Adafactor")
OVERLAP_GROWS_TO = 16  # an adaptive gap becomes at most so many times the one asked for


Rows = Sequence[tuple[Slot, Any]]  # expert, and what picks its rows out of all; None: all of them
EVERY: Rows = ((..., None),)


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


@dataclass
class _Seen:
    """What one module's running step has shown: `ΩᵀG` (k, in), `GΩ` (out, k), or G (out, in), of each expert; and by which Ω."""

    parameter: torch.Tensor
    handle: RemovableHandle
    sum: torch.Tensor | None = None
    omegas: dict[Slot, torch.Tensor] = field(default_factory=dict)
    counted: bool = False  # some of it is in the gradient by now


class Refresher:
    """Renews the bases of one adapter's projected modules. State is real here: what the running step has shown of those due."""

    def __init__(self, how: Refreshing) -> None:
        self.how = how
        self._seen: dict[str, _Seen] = {}
        self._anchor: torch.Tensor | None = None
        self._row: Row | None = None  # what is known of the optimizer that steps
        self._off = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Refresher:
        return Refresher(self.how)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()  # a pickled model is followed by nobody

    def arm(self, model: nn.Module, adapter: str) -> None:
        """Watches the modules whose next step gives them a basis; called before a forward pass, and after every step."""
        layers = dict(projections(model, adapter))
        self._spread([state_of(layer) for layer in layers.values()])
        for name, layer in layers.items():
            unscale(layer)
            state = state_of(layer)
            due = state.steps >= state.due and trained_of(layer).requires_grad
            state.watcher, state.watched = self, self.how.subspace != "random" and due
            if not state.watched:
                self._forget(name)

    def switched(self, model: nn.Module, adapter: str, training: set[str]) -> None:
        """Other modules train from now on: those that did not until now get a new basis at their next step."""
        for name, layer in projections(model, adapter):
            state = state_of(layer)
            if name in training and not state.active:
                state.due = state.steps
            state.active = name in training
        self.arm(model, adapter)

    def disarm(self) -> None:
        """Stops watching, for good."""
        self._off = True
        for name in list(self._seen):
            self._forget(name)

    def restart(self) -> None:
        """Forgets what a step saw that a loss scaler skipped."""
        for name in list(self._seen):
            self._forget(name)

    def before_step(
        self, model: nn.Module, adapter: str, optimizer: Optimizer, held: set[int], closure: bool = False
    ) -> None:
        """Exact subspaces serve the very step whose gradient they come from, as in the reference.

        Raises: TrainingError for an optimizer whose steps a fold would spoil, and for a step that has no gradient yet.
        """
        for _, layer in projections(model, adapter) if self._row is None else ():
            refuse_part(layer)
        self._row = check(optimizer, self.how.moments)
        if self._row is not None and self._row.name in MATRIX_WISE:
            _refuse_experts(self._row.name, model, adapter)
        if self.how.subspace != "svd":
            return
        if closure:
            raise TrainingError(
                "subspace='svd' gives a step the basis of its own gradient, which a step with a closure does not have before it "
                "begins; use subspace='sketch'"
            )
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
            elif state_of(layer).watched and trained_of(layer).grad is not None:
                self._failed(state_of(layer), "its gradient could not be watched (torch.compile hides it)")
        for name, layer in projections(model, adapter):
            if id(trained_of(layer)) in held:
                state_of(layer).steps += 1
                self._forget(name)
        self.arm(model, adapter)

    def _due(self, model: nn.Module, adapter: str, held: set[int]) -> list[tuple[str, Any]]:
        return [
            (n, layer)
            for n, layer in projections(model, adapter)
            if id(trained_of(layer)) in held and state_of(layer).steps >= state_of(layer).due
        ]

    def _renew(self, layer: Any, seen: torch.Tensor | None, optimizer: Optimizer) -> bool:
        """A new basis, the old period folded away; False where nothing usable was found, and the old basis stays.

        An expert that no token reached keeps its own.
        """
        state, old = state_of(layer), wide(basis_of(layer)).clone()
        found = _bases(layer, old, seen)
        if found is None:
            self._failed(state, "no new subspace was found")
        if not found:
            return False
        found = {slot: new.to(old) for slot, new in found.items()}
        state.overlap = sum(subspace.overlap(new, old[slot]) for slot, new in found.items()) / len(found)
        self._adapt(state)
        fold(layer)
        means, squares = self._moments(optimizer.state.get(trained_of(layer), {}))
        for slot, new in found.items():
            if self.how.basis == "aligned" and state.refreshes:
                new = subspace.aligned(new, old[slot])
            m, s = ([at(like_trained(layer, t), slot) for t in some] for some in (means, squares))
            rotate(old[slot], new, m, s, state.side, self.how.moments)
            set_basis(layer, new, slot)
        state.refreshes += 1
        state.due = state.steps + (state.gap if state.refreshes > 1 else state.first_gap)
        return True

    def _moments(self, states: Mapping[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The optimizer's averages of gradients and of their squares, of one trained factor."""
        if self._row is None:
            return [], []
        found = {k: v for k, v in states.items() if isinstance(v, torch.Tensor) and v.dim() == 2}
        return [found[k] for k in self._row.means if k in found], [found[k] for k in self._row.squares if k in found]

    def _failed(self, state: Projection, why: str) -> None:
        state.failed += 1
        state.due = state.steps + 1
        if state.failed & (state.failed - 1) == 0:  # the first, second, fourth, eighth time
            note(f"{state.name}: {why} ({state.failed} time(s) so far); it goes on in the old subspace")

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
        seen = self._seen.get(name)
        found = seen.sum if seen is not None else None
        self._forget(name)
        if distributed.world_size() == 1:
            return found
        if not distributed.everywhere(found is not None):
            return None
        assert found is not None
        return distributed.add_up(found).to(found.device)

    def _forget(self, name: str) -> None:
        seen = self._seen.pop(name, None)
        if seen is not None:
            seen.handle.remove()

    @torch.compiler.disable
    def __call__(self, layer: Any, y: torch.Tensor, x: torch.Tensor, rows: Rows = EVERY) -> torch.Tensor:
        """A watched module's output, whose gradient will be seen. It runs outside of compiled code, where it would be lost.

        `rows`: which of the flattened rows went through which expert.
        """
        if self._off or not y.is_floating_point():
            return y
        name, trained = state_of(layer).name, trained_of(layer)
        if name not in self._seen or self._seen[name].parameter is not trained:
            self._forget(name)
            handle = trained.register_post_accumulate_grad_hook(partial(self._count, name))
            self._seen[name] = _Seen(trained, handle)
        if self._anchor is None or self._anchor.device != y.device:
            self._anchor = torch.zeros((), device=y.device, requires_grad=True)
        return tapped(y, x, self._anchor, partial(self._see, layer, rows))

    def _count(self, name: str, _: torch.Tensor) -> None:
        if name in self._seen:
            self._seen[name].counted = True

    def _see(self, layer: Any, rows: Rows, gy: torch.Tensor, x: torch.Tensor) -> None:
        """Adds one call's share; what came of gradients that were dropped since (a skipped step, a batch thrown away) goes."""
        state = state_of(layer)
        seen = self._seen.get(state.name)
        if seen is None:
            return
        grad = seen.parameter.grad
        if seen.counted and (grad is None or not bool(grad.any())):
            seen.sum, seen.counted = None, False
        gy, x = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1]).to(gy.dtype)
        for slot, some in rows:
            part = wide(self._share(layer, seen, slot, *((gy, x) if some is None else (gy[some], x[some]))))
            if not state.experts:
                seen.sum = part if seen.sum is None else seen.sum + part
                continue
            if seen.sum is None:
                seen.sum = part.new_zeros(state.experts, *part.shape)
            seen.sum[slot] += part

    def _share(self, layer: Any, seen: _Seen, slot: Slot, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What some rows show of one matrix's gradient."""
        state = state_of(layer)
        if self.how.subspace == "svd":
            return gy.T @ x
        if slot not in seen.omegas:
            warm = like_trained(layer, trained_of(layer).detach())[slot]
            key = f"{state.key}|sketch {state.refreshes}" + (f"|{slot}" if state.experts else "")
            warm = warm if state.side == "right" else warm.T
            seen.omegas[slot] = subspace.sketching_matrix(key, warm, self.how.oversample)
        omega = seen.omegas[slot].to(gy.dtype)
        return (gy @ omega).T @ x if state.side == "right" else gy.T @ (x @ omega)


def _nobody() -> None:
    """In the place of a refresher that was pickled."""


def _projected(gradient: torch.Tensor, layer: Any) -> torch.Tensor:
    """The gradient of the trained factor, from the whole gradient: `G Qᵀ`, or `Pᵀ G`."""
    basis = basis_of(layer).to(gradient.dtype)
    found = torch.empty_like(trained_of(layer), dtype=gradient.dtype)
    like_trained(layer, found).copy_(gradient @ basis.mT if state_of(layer).side == "right" else basis @ gradient)
    return found


def _bases(layer: Any, old: torch.Tensor, seen: torch.Tensor | None) -> dict[Slot, torch.Tensor] | None:
    """New orthonormal rows for all that the step has shown, at random where it was not asked; None where one cannot be found."""
    state, (rank, size) = state_of(layer), old.shape[-2:]
    found: dict[Slot, torch.Tensor] = {}
    for slot in state.slots:
        if seen is None:
            key = f"{state.key}|{state.refreshes}" + (f"|{slot}" if state.experts else "")
            found[slot] = subspace.random_basis(key, rank, size, old)
        elif not state.experts or bool(seen[slot].any()):
            new = subspace.strongest(seen[slot], rank, state.side)
            if new is None:
                return None
            found[slot] = new
    return found


def _refuse_experts(name: str, model: nn.Module, adapter: str) -> None:
    """Raises: TrainingError for an optimizer that takes the factors of all experts for one matrix."""
    held = [n for n, layer in projections(model, adapter) if state_of(layer).experts]
    if held:
        raise TrainingError(
            f"{name} looks at what it trains as one matrix, and the factors of all experts of {held[0]} lie in one tensor; train "
            "experts with AdamW or another optimizer that goes by elements"
        )


def _factor(grad: torch.Tensor, unclipped: torch.Tensor) -> float:
    """By what a clipped or unscaled gradient differs from what the taps saw; 1 within rounding."""
    whole = float(unclipped.double().square().sum())
    factor = float((grad.double() * unclipped.double()).sum()) / whole if whole else 1.0
    return factor if abs(factor - 1.0) > 1e-4 else 1.0
