"""When projected modules get a new basis, and from what: around the optimizer's steps, without any trainer's help."""

from collections.abc import Iterator, Mapping, Set
from contextlib import nullcontext
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from layerpeft.errors import TrainingError
from layerpeft.integrations.engines.fsdp import give_up, is_inside
from layerpeft.integrations.engines.known import set_gradient, states_of, whole_gradient
from layerpeft.text import note
from layerpeft.training.method import Method, Step
from layerpeft.tuners.galore import projection, subspace
from layerpeft.tuners.galore.optimizers import Row, check
from layerpeft.tuners.galore.projection import Projection, Slot, at, basis_of, like_trained, state_of, trained_of
from layerpeft.tuners.galore.watch import Refreshing, Watcher

# optimizers that look at a tensor as one matrix, while that of experts holds as many as there are experts
MATRIX_WISE = ("Muon", "Adafactor")
OVERLAP_GROWS_TO = 16  # an adaptive gap becomes at most so many times the one asked for


class Refresher:
    """Renews the bases of one adapter's projected modules. State is real here: who watches those that are due."""

    def __init__(self, method: Method, how: Refreshing, watcher: Watcher | None = None) -> None:
        self.method, self.how, self.watcher = method, how, watcher or Watcher(how)
        self.watcher.gathers = self._gathers
        self._row: Row | None = None  # what is known of the optimizer that steps

    def layers(self) -> Iterator[tuple[str, Any]]:
        """The projected modules, by name."""
        return projection.projections(self.method.model, self.method.adapter)

    def _gathers(self) -> bool:
        return self.method.alive and is_inside(self.method.model)

    def arm(self) -> None:
        """Watches the modules whose next step gives them a basis; called before a forward pass, and after every step."""
        layers = dict(self.layers())
        self._spread([state_of(layer) for layer in layers.values()])
        for name, layer in layers.items():
            projection.unscale(layer)
            state = state_of(layer)
            due = state.steps >= state.due and trained_of(layer).requires_grad
            state.watcher, state.watched = self.watcher, self.how.subspace != "random" and due
            if not state.watched:
                self.watcher.forget(name)

    def switched(self, training: Set[str]) -> None:
        """Other modules train from now on: those that did not until now get a new basis at their next step."""
        for name, layer in self.layers():
            state = state_of(layer)
            if name in training and not state.active:
                state.due = state.steps
            state.active = name in training
        self.arm()

    def before_step(self, step: Step) -> None:
        """Exact subspaces serve the very step whose gradient they come from, as in the reference.

        Raises: TrainingError for an optimizer whose steps a fold would spoil, and for a step that has no gradient yet.
        """
        if not step.inside:
            give_up(self.method.model)
        for _, layer in self.layers():
            projection.refuse_part(layer)
        self._row = check(step.optimizer, self.how.moments)
        if self._row is not None and self._row.name in MATRIX_WISE:
            self._refuse_experts(self._row.name)
        if self.how.subspace != "svd":
            return
        if step.inside:
            raise TrainingError(
                f"subspace='svd' gives a step the basis of its own gradient, and {type(step.optimizer).__name__} steps inside the "
                "backward pass, which needs the basis before; use subspace='sketch', or an optimizer that steps after it"
            )
        for name, layer in self._due(step.held):
            gradient, grad = self.watcher.take(name), whole_gradient(trained_of(layer))
            if gradient is None or grad is None:
                continue
            clipped = _factor(grad, _projected(gradient, layer))
            if self._renew(layer, gradient, step.optimizer):
                set_gradient(trained_of(layer), clipped * _projected(gradient, layer))

    def after_step(self, step: Step) -> None:
        """Sketched and random subspaces serve from the next step on."""
        for name, layer in self._due(step.held) if self.how.subspace != "svd" else ():
            found = None if self.how.subspace == "random" else self.watcher.take(name)
            if self.how.subspace == "random" or found is not None:
                self._renew(layer, found, step.optimizer)
            elif state_of(layer).watched and trained_of(layer).grad is not None:
                self._failed(state_of(layer), "its gradient could not be watched (torch.compile hides it)")
        for name, layer in self.layers():
            if id(trained_of(layer)) in step.held:
                state_of(layer).steps += 1
                self.watcher.forget(name)
        self.arm()

    def _due(self, held: set[int]) -> list[tuple[str, Any]]:
        mine = [(n, layer) for n, layer in self.layers() if id(trained_of(layer)) in held]
        return [(n, layer) for n, layer in mine if state_of(layer).steps >= state_of(layer).due]

    def _renew(self, layer: Any, seen: torch.Tensor | None, optimizer: Optimizer) -> bool:
        """A new basis, the old period folded away; False where nothing usable was found, and the old basis stays.

        An expert that no token reached keeps its own.
        """
        state, old = state_of(layer), projection.wide(basis_of(layer)).clone()
        found = _bases(layer, old, seen)
        if found is None:
            self._failed(state, "no new subspace was found")
        if not found:
            return False
        found = {slot: new.to(old) for slot, new in found.items()}
        state.overlap = sum(subspace.overlap(new, old[slot]) for slot, new in found.items()) / len(found)
        self._adapt(state)
        projection.fold(layer)
        with states_of(optimizer, trained_of(layer)) if self.how.moments != "keep" else nullcontext({}) as states:
            means, squares = self._moments(states)
            for slot, new in found.items():
                if self.how.basis == "aligned" and state.refreshes:
                    new = subspace.aligned(new, old[slot])
                m, s = ([at(like_trained(layer, t), slot) for t in some] for some in (means, squares))
                projection.rotate(old[slot], new, m, s, state.side, self.how.moments)
                projection.set_basis(layer, new, slot)
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
            most = OVERLAP_GROWS_TO * self.how.update_proj_gap
            stays = state.overlap >= self.how.gap_overlap
            state.gap = min(2 * state.gap, most) if stays else self.how.update_proj_gap

    def _refuse_experts(self, name: str) -> None:
        """Raises: TrainingError for an optimizer that takes the factors of all experts for one matrix."""
        held = [n for n, layer in self.layers() if state_of(layer).experts]
        if held:
            raise TrainingError(
                f"{name} looks at what it trains as one matrix, and the factors of all experts of {held[0]} lie in one tensor; "
                "train experts with AdamW or another optimizer that goes by elements"
            )

    def _spread(self, states: list[Projection]) -> None:
        """Lets the second refreshes, and so all later ones, fall on steps that are spread over the gap."""
        for number, state in enumerate(states):
            state.first_gap = number * state.gap // len(states) or state.gap if self.how.stagger else state.gap


def _projected(gradient: torch.Tensor, layer: Any) -> torch.Tensor:
    """The gradient of the trained factor, from the whole gradient: `G Qᵀ`, or `Pᵀ G`."""
    basis = basis_of(layer).to(gradient.dtype)
    found = torch.empty(trained_of(layer).shape, dtype=gradient.dtype, device=gradient.device)
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


def _factor(grad: torch.Tensor, unclipped: torch.Tensor) -> float:
    """By what a clipped or unscaled gradient differs from what the taps saw; 1 within rounding."""
    whole = float(unclipped.double().square().sum())
    factor = float((grad.double() * unclipped.double()).sum()) / whole if whole else 1.0
    return factor if abs(factor - 1.0) > 1e-4 else 1.0
