"""What a module that is due for a new basis shows of its gradient in the running step, without the whole of it being kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from layerpeft.integrations import distributed
from layerpeft.integrations.engines.known import is_stepped_apart
from layerpeft.selection.probe import tapped
from layerpeft.tuners.galore import subspace
from layerpeft.tuners.galore.projection import Slot, like_trained, state_of, trained_of, wide

Rows = Sequence[tuple[Slot, Any]]  # expert, and what picks its rows out of all; None: all of them
EVERY: Rows = ((..., None),)


@dataclass(frozen=True)
class Refreshing:
    """How bases are renewed; the fields are those of `LayerGaloreConfig`."""

    update_proj_gap: int
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


class Watcher:
    """Watches modules whose state names it. State is real here: what the running step has shown."""

    def __init__(self, how: Refreshing) -> None:
        self.how = how
        self._seen: dict[str, _Seen] = {}
        self._anchor: torch.Tensor | None = None
        self._off = False
        # whether factors are put together for a pass, without a gradient after it
        self.gathers: Callable[[], bool] = lambda: False

    def __deepcopy__(self, memo: dict[int, Any]) -> Watcher:
        return Watcher(self.how)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()  # a pickled model is followed by nobody

    def close(self) -> None:
        """Stops watching, for good."""
        self._off = True
        self.restart()

    def restart(self) -> None:
        """Forgets everything."""
        for name in list(self._seen):
            self.forget(name)

    def take(self, name: str) -> torch.Tensor | None:
        """What the step has shown of a module, in all processes together, and forgets it; None where that is nothing."""
        seen = self._seen.get(name)
        found = seen.sum if seen is not None else None
        self.forget(name)
        if distributed.world_size() == 1:
            return found
        if not distributed.everywhere(found is not None):
            return None
        assert found is not None
        return distributed.add_up(found).to(found.device)

    def forget(self, name: str) -> None:
        """Drops what a module has shown."""
        seen = self._seen.pop(name, None)
        if seen is not None:
            seen.handle.remove()

    @torch.compiler.disable
    def __call__(self, layer: Any, y: torch.Tensor, x: torch.Tensor, rows: Rows = EVERY) -> torch.Tensor:
        """A watched module's output, whose gradient will be seen. It runs outside of compiled code, where it would be lost.

        `rows`: which of the flattened rows went through which expert.
        """
        name, trained = state_of(layer).name, trained_of(layer)
        if self._off or not y.is_floating_point() or not trained.requires_grad:
            return y
        if name not in self._seen or self._seen[name].parameter is not trained:
            self.forget(name)
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
        grad, apart = seen.parameter.grad, is_stepped_apart(seen.parameter)
        if seen.counted and not apart and (grad is None or not bool(grad.any())) and not self.gathers():
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
