"""A module whose weight is trained by gradient projection: PEFT's LoRA module with one factor fixed, and the folds behind it.

`W + s·B·Q` with `Q` (r, in) fixed and `B` (out, r) trained is LoRA with its A frozen ("right"); `W + s·P·C` with `P` (out, r) fixed
is LoRA with its B frozen ("left"). The gradient of the trained factor is divided by s on its way, so that it is the projected
gradient `G Qᵀ` itself, as in GaLore (arXiv 2403.03507), and clipping and SGD mean what they mean there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from layerpeft.errors import ConfigError
from layerpeft.folds import Factors, Folds, exactly, part, stacked, stochastically
from layerpeft.integrations.peft import LoraLayer, LoraLinear, dequantized, lora_layers
from layerpeft.subspace import random_basis, rotation

LOW = (torch.bfloat16, torch.float16)


@dataclass
class Projection:
    """The running state of one projected module; `steps` and `refreshes` count its own active time."""

    name: str
    adapter: str
    side: str
    scale: float
    fold: str
    seed: int
    folds: Folds
    gap: int
    due: int = 0  # the step, of its own, whose gradient gives the next basis
    first_gap: int = 0  # from the first refresh to the second, so that later ones are spread over steps
    steps: int = 0
    refreshes: int = 0
    failed: int = 0
    overlap: float | None = None
    original: torch.Tensor | None = None  # the weight as it was, from the first fold on
    working: torch.Tensor | None = None  # the weight with the folds in it, while the module shows the original
    beside: list[Factors] = field(default_factory=list)  # folds over a quantized weight, on its device

    @property
    def key(self) -> str:
        """What random draws of this module go by."""
        return f"{self.seed}|{self.name}"


class Projected:
    """What a projected module does otherwise than a LoRA module: the base comes back bit for bit when it is asked for."""

    _layerpeft_projection: Projection

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Shows the working weight or the original one."""
        state = self._layerpeft_projection
        if not enabled and state.fold == "base" and state.original is not None and self.training:
            raise ConfigError(
                "fold='base' keeps the original weights on the CPU, and disable_adapter() during training wants them at every "
                "step (DPO, KTO and GRPO take their reference from it); use fold='beside'"
            )
        super().enable_adapters(enabled)  # type: ignore[misc]
        show(self, working=enabled and state.adapter in self.active_adapters)

    def set_adapter(self: Any, adapter_names: Any, inference_mode: bool = False) -> None:
        """The folds belong to one adapter: another one finds the original weight."""
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        state = getattr(self, "_layerpeft_projection", None)
        if state is not None:
            show(self, working=state.adapter in self.active_adapters and not self.disable_adapters)

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrapper: with all folds and the running period, or as it was in the beginning."""
        if merge:
            show(self, working=True)
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            show(self, working=False)
        return self.get_base_layer()

    @torch.no_grad()
    def trained_change(self: Any) -> tuple[float, float]:
        """(‖ΔW‖², ‖W‖²) of all that was trained, folds included, against the original weight."""
        state, base = self._layerpeft_projection, self.get_base_layer()
        left, right = held(self)
        before = state.original if state.original is not None else dequantized(base)
        return float((left.double() @ right.double()).square().sum()), float(before.double().square().sum())

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output; over a quantized weight the folds are a second branch."""
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        state = self._layerpeft_projection
        if state.beside and state.adapter in self.active_adapters and not self.disable_adapters and not self.merged:
            left, right = state.beside[0]
            y = y + linear(linear(x.to(left.dtype), right), left).to(y.dtype)
        return y


class ProjectedLinear(Projected, LoraLinear):
    """A linear, or Conv1D, trained by projection."""


_CLASSES: dict[type, type] = {LoraLinear: ProjectedLinear}


def project(layer: Any, state: Projection) -> None:
    """Turns a LoRA module into a projected one: a random orthonormal basis, a zero trained factor, and its gradient unscaled."""
    kind = type(layer)
    if not issubclass(kind, Projected):
        layer.__class__ = _CLASSES.setdefault(kind, type(f"Projected{kind.__name__}", (Projected, kind), {}))
    layer._layerpeft_projection = state
    frozen = "lora_A" if state.side == "right" else "lora_B"
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, state.adapter: (frozen,)}
    fixed, trained = fixed_of(layer), trained_of(layer)
    fixed.requires_grad_(False)
    if fixed.device.type != "meta":
        rank, size = (fixed.shape[0], fixed.shape[1]) if state.side == "right" else (fixed.shape[1], fixed.shape[0])
        with torch.no_grad():
            trained.zero_()
        set_basis(layer, random_basis(f"{state.key}|first", rank, size, fixed))
    unscale(layer)


def unscale(layer: Any) -> None:
    """Lets the trained factor's gradient be that of the projected problem; once for each tensor that takes its place."""
    state, trained = state_of(layer), trained_of(layer)
    if state.scale != 1.0 and not getattr(trained, "_layerpeft_unscaled", False):
        trained.register_hook(_Unscale(1 / state.scale))
        trained._layerpeft_unscaled = True  # type: ignore[attr-defined]


class _Unscale:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.factor


def state_of(layer: Any) -> Projection:
    """The state of a projected module."""
    return layer._layerpeft_projection


def projections(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The projected modules of an adapter, by their name in the unwrapped model."""
    for layer in lora_layers(model, adapter).values():
        state = getattr(layer, "_layerpeft_projection", None)
        if state is not None and state.adapter == adapter:
            yield state.name, layer


def originals(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The weights as they were, by parameter name, of the modules whose working weight has folds in it."""
    found = ((n, state_of(layer).original) for n, layer in projections(model, adapter))
    return {f"{n}.weight": weight for n, weight in found if weight is not None}


def folded(model: nn.Module, adapter: str) -> set[str]:
    """The modules that have folds."""
    return {n for n, layer in projections(model, adapter) if state_of(layer).folds.count}


def fixed_of(layer: LoraLayer) -> nn.Parameter:
    """The factor that is fixed within a period: Q (r, in), or P (out, r)."""
    state = state_of(layer)
    return (layer.lora_A if state.side == "right" else layer.lora_B)[state.adapter].weight  # type: ignore[return-value]


def trained_of(layer: LoraLayer) -> nn.Parameter:
    """The factor that trains: B (out, r), or C (r, in)."""
    state = state_of(layer)
    return (layer.lora_B if state.side == "right" else layer.lora_A)[state.adapter].weight  # type: ignore[return-value]


def basis_of(layer: LoraLayer) -> torch.Tensor:
    """The fixed factor as orthonormal rows, (r, size)."""
    fixed = fixed_of(layer).detach()
    return fixed if state_of(layer).side == "right" else fixed.T


@torch.no_grad()
def set_basis(layer: LoraLayer, rows: torch.Tensor) -> None:
    """Puts orthonormal rows (r, size) in the place of the fixed factor."""
    fixed_of(layer).copy_(rows if state_of(layer).side == "right" else rows.T)


def running(layer: LoraLayer) -> Factors:
    """The running period as factors (out, r), (r, in), scale included."""
    state = state_of(layer)
    a, b = layer.lora_A[state.adapter].weight.detach(), layer.lora_B[state.adapter].weight.detach()  # type: ignore[union-attr]
    return (state.scale * b, a) if state.side == "right" else (b, state.scale * a)


@torch.no_grad()
def fold(layer: LoraLayer) -> None:
    """Takes the running period into the sum of folds and into the working weight, and zeroes the trained factor."""
    if not bool(trained_of(layer).any()):
        return
    state_of(layer).folds.add(*running(layer))
    trained_of(layer).zero_()
    refold(layer)


@torch.no_grad()
def refold(layer: Any) -> None:
    """Forms the working weight anew from the original and the whole sum, so that rounding never adds up over folds."""
    state: Any = state_of(layer)
    weight = layer.get_base_layer().weight
    if not weight.is_floating_point():
        like = trained_of(layer)
        state.beside = [
            (p.to(like.device, like.dtype), q.to(like.device, like.dtype)) for p, q in [state.folds.factors()]
        ]
        return
    if state.original is None:
        state.original = weight.detach().to("cpu" if state.fold == "base" else weight.device, copy=True)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    change = state.folds.sum().to(weight.device, wide)
    whole = state.original.to(weight.device, wide) + (change.T if layer.fan_in_fan_out else change)
    if weight.dtype in LOW:
        generator = torch.Generator().manual_seed(hash_of(f"{state.key}|{state.folds.count}"))
        whole = stochastically(whole, weight.dtype, generator)
    if state.working is not None:
        state.working.copy_(whole)
    else:
        weight.data.copy_(whole)


def hash_of(text: str) -> int:
    """A seed from a text, equal in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@torch.no_grad()
def show(layer: Any, *, working: bool) -> None:
    """Puts the working weight, or the original, into the module; nothing is copied where it is there already."""
    state: Any = state_of(layer)
    if state.original is None or working == (state.working is None):
        return
    weight = layer.get_base_layer().weight
    if working:
        weight.data = state.working.to(weight.device)
        state.working = None
    else:
        state.working = weight.data
        weight.data = state.original.to(weight.device)


def held(layer: Any) -> Factors:
    """All that was trained, as factors (out, k), (k, in), scale included: what the weights really hold.

    A weight in a short dtype holds the sum of folds rounded, so it is the difference of working weight and original that counts.
    """
    state = state_of(layer)
    weight = layer.get_base_layer().weight
    now = tuple(t.cpu() for t in running(layer))
    if state.original is None or weight.dtype not in LOW:
        both = stacked([state.folds.factors(), now])  # type: ignore[list-item]
        return both if both[0].shape[1] < min(state.folds.out, state.folds.into) else exactly(both[0] @ both[1])
    working = state.working if state.working is not None else weight.data
    change = working.float().cpu() - state.original.float().cpu()
    return exactly((change.T if layer.fan_in_fan_out else change) + now[0].float() @ now[1].float())


@torch.no_grad()
def rotate(old: torch.Tensor, new: torch.Tensor, moments: Mapping[str, Any], side: str, policy: str) -> None:
    """What a refresh does with the optimizer's moments of a trained factor: `keep`, `reset`, or `project` into the new basis.

    `project` takes first moments as coordinates, `m (old newᵀ)`, and second ones as their variances, with the squared matrix (as in
    LDAdam, arXiv 2410.16103, without its correction).
    """
    if policy == "keep":
        return
    turn = rotation(old, new)
    for name, moment in moments.items():
        if not isinstance(moment, torch.Tensor) or moment.dim() != 2 or not moment.is_floating_point():
            continue
        if policy == "reset":
            moment.zero_()
            continue
        by = (turn.square() if "sq" in name else turn).to(moment)
        moment.copy_(moment @ by if side == "right" else by.T @ moment)


def tensors(layer: Any) -> dict[str, torch.Tensor]:
    """All that a resumed run needs of one module."""
    state = state_of(layer)
    counts = [state.gap, state.due, state.steps, state.refreshes, state.failed]
    found = {"fixed": fixed_of(layer).detach().cpu(), "trained": trained_of(layer).detach().cpu()}
    return found | {"counts": torch.tensor(counts)} | {f"folds.{k}": v for k, v in state.folds.state().items()}


@torch.no_grad()
def restore(layer: Any, saved: Mapping[str, torch.Tensor]) -> None:
    """Takes over what `tensors` gave, the working weight included."""
    state = state_of(layer)
    state.gap, state.due, state.steps, state.refreshes, state.failed = saved["counts"].tolist()
    state.folds.restore(part(saved, "folds."))
    fixed_of(layer).copy_(saved["fixed"])
    trained_of(layer).copy_(saved["trained"])
    if state.folds.count:
        refold(layer)
    elif state.original is not None:
        show(layer, working=True)
        layer.get_base_layer().weight.data.copy_(state.original)
