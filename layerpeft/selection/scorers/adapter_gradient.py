"""Gradients of the adapters that train, as IR-Tuning scores layers (arXiv 2510.00268).

`s_l = sqrt(Σ over tensors and micro-batches of ‖g_p‖^0.5)` is the published score, a root of roots: a hundredfold
gradient shows as 3.16, and the score grows with the number of tensors and of micro-batches. `form: norm` is `sqrt(mean
over micro-batches of Σ over tensors of ‖g_p‖²)` instead. Only layers that train have such gradients; of the others the
answer is None, and a schedule goes on with what it knew (`unseen` where it never saw a layer), which is the published
rule's fault: a score goes stale once its layer is frozen. `gradient_norm` sees frozen layers, too. Not shared: norms
that are not finite counting as 1000 (such a batch is left out), and the losses' scales (accumulation, a loss scaler) in
the score.

Costs no pass of its own, and the norm of every gradient that training makes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.errors import NothingSeenError
from layerpeft.integrations.torch import eager
from layerpeft.model.layers import standing_at
from layerpeft.model.names import modules_in
from layerpeft.selection.scorers import OF_TARGETS, Traits
from layerpeft.selection.scoring import Measured, Request, Watching

TRAITS = Traits(
    live_only=True, units=OF_TARGETS, unseen=1000.0
)  # a layer that has not trained yet: more than any gradient


@dataclass(frozen=True)
class Options:
    """`form`: `published`, or `norm`, a root mean square over batches of the norm over all of a layer's tensors."""

    form: Literal["published", "norm"] = "published"


def needs(options: Options) -> str:
    """The forward and backward passes of training."""
    return "backward"


class AdapterGradients(Watching):
    """The running measurement: a hook on every tensor that trains in a layer that holds targets."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        self.scales_known = True
        self._count: float | None = None  # batches of all processes
        self._power = 0.5 if options.form == "published" else 2.0
        self._fresh: list[tuple[int, torch.Tensor]] = []  # of the running batch: layer, ‖g‖
        self._as_it_came: dict[int, float] = {}
        self._unscaled: dict[int, float] = {}
        self._hooked: set[int] = set()

    def attach(self) -> None:
        """Puts the hooks on. Tensors that begin to train later on get theirs at the next forward pass."""
        self._hooked.clear()
        self._handles.append(self._model.register_forward_pre_hook(eager(self._watch)))
        self._watch()

    def next_batch(self, scale: float | None = None) -> None:
        """Closes the batch, whose loss was multiplied by `scale` (None: not known)."""
        norms = torch.stack([n.cpu() for _, n in self._fresh]).tolist() if self._fresh else []
        if norms and all(n < float("inf") for n in norms):
            self.batches += 1
            self.scales_known &= scale is not None
            factor = 1.0 if scale is None else scale**-self._power
            for (layer, _), norm in zip(self._fresh, norms, strict=True):
                part = norm**self._power
                self._as_it_came[layer] = self._as_it_came.get(layer, 0.0) + part
                self._unscaled[layer] = self._unscaled.get(layer, 0.0) + part * factor
        self._fresh.clear()

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums the parts and the batch counts over processes, layer by layer."""
        layers = range(len(self.request.layers))
        facts = torch.tensor(
            [float(self.batches), float(not self.scales_known), *(float(i in self._unscaled) for i in layers)]
        )
        batches, unknown, *seen = add(facts).tolist()
        self._count, self.scales_known = batches, not unknown
        mine = self._sums()
        sums = add(torch.tensor([mine.get(i, 0.0) for i in layers], dtype=torch.float64)).tolist()
        self._as_it_came = self._unscaled = {i: sums[i] for i in layers if seen[i]}

    def result(self) -> Measured:
        """A number per layer that trains, None for the others. Raises: ScoreError when no gradient was seen at all."""
        sums = self._sums()
        if not sums:
            raise NothingSeenError(
                "no tensor that trains in these layers got a gradient: nothing trains there, the loss does not depend on it, or "
                "its gradients are shared out over processes before they can be seen; choose by gradient_norm"
            )
        if not any(sums.values()):
            raise NothingSeenError("all gradients are exactly zero: all labels are ignored, or all rewards are equal")
        count = 1 if self.options.form == "published" else self._count or self.batches
        values = ((sums[i] / count) ** 0.5 if i in sums else None for i in range(len(self.request.layers)))
        return Measured(tuple(values))

    def _sums(self) -> dict[int, float]:
        return self._unscaled if self.scales_known else self._as_it_came

    def _watch(self, *_: Any) -> None:
        for layer in sorted({t.layer for t in self.request.targets}):
            for parameter in _tensors_in(self.request.model, self.request.layers.names[layer]):
                if parameter.requires_grad and id(parameter) not in self._hooked:
                    self._hooked.add(id(parameter))
                    self._handles.append(parameter.register_hook(self._hear(layer)))

    def _hear(self, layer: int) -> Callable[[torch.Tensor], None]:
        def hear(gradient: torch.Tensor) -> None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._fresh.append((layer, torch.linalg.vector_norm(gradient.detach(), dtype=wide)))

        return hear


start = AdapterGradients


def _tensors_in(model: nn.Module, unit: str) -> Iterator[torch.Tensor]:
    """Those of the modules that a unit's name stands for; of a weight that trains by itself, itself."""
    for name in modules_in(unit):
        module, leaf = standing_at(model, name), name.rpartition(".")[2]
        yield from [module._parameters[leaf]] if leaf in module._parameters else module.parameters()  # type: ignore[misc]
