"""A module whose weight is trained by gradient projection: PEFT's LoRA module with one factor fixed, and the folds behind it."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from layerpeft.errors import ConfigError
from layerpeft.integrations.peft import LoraLinear, dequantized
from layerpeft.tuners.galore import projection
from layerpeft.tuners.galore.projection import Projection, show
from layerpeft.tuners.galore.subspace import random_basis

ONE_ONLY = (
    "a model has one adapter that is trained by projection, because its folds lie in the weights: {name!r} cannot be another, nor "
    "a copy of it. Where a trainer wants a copy of what was trained before (DPO without a reference model), merge it first "
    "(layerpeft merge, or merge_and_unload) and train a new adapter over that, or give the trainer a ref_model"
)


class Projected:
    """What a projected module does otherwise than a LoRA module: the base comes back bit for bit when it is asked for."""

    _layerpeft: Projection

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Takes another adapter. Raises: ConfigError for a second projection."""
        config = kwargs.get("config") or next((a for a in args if hasattr(a, "projects")), None)
        if getattr(config, "projects", False):
            raise ConfigError(ONE_ONLY.format(name=adapter_name))
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Shows the working weight or the original one."""
        state = self._layerpeft
        if not enabled and state.fold == "base" and state.original is not None and self.training:
            raise ConfigError(
                "fold='base' keeps the original weights on the CPU, and disable_adapter() during training wants them at every "
                "step (DPO, KTO and GRPO take their reference from it); use fold='beside'"
            )
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)  # type: ignore[misc]
        show(self, working=enabled and state.adapter in self.active_adapters)

    def set_adapter(self: Any, adapter_names: Any, inference_mode: bool = False) -> None:
        """The folds belong to one adapter: another one finds the original weight."""
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        state = getattr(self, "_layerpeft", None)
        if state is not None:
            show(self, working=state.adapter in self.active_adapters and not self.disable_adapters)

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Takes the running period into the weight; what the weight was is kept, so that it comes back bit for bit."""
        state = self._layerpeft
        if state.adapter in (adapter_names or self.active_adapters) and not self.merged:
            projection.keep_original(self)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def unmerge(self: Any) -> None:
        """Forms the weight anew; nothing is taken off it, which would leave rounding."""
        if self.merged_adapters == [self._layerpeft.adapter]:
            self.merged_adapters.clear()
            projection.restart(self)
        else:
            super().unmerge()  # type: ignore[misc]

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrapper: with all folds and the running period, or as it was in the beginning."""
        if merge:
            show(self, working=self._layerpeft.adapter in (adapter_names or self.active_adapters))
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        else:
            if self.merged:
                self.unmerge()
            show(self, working=False)
        return self.get_base_layer()

    def get_delta_weight(self: Any, adapter: str) -> torch.Tensor:
        """What a merge adds to the weight: the running period, and the folds that a quantized weight has beside it."""
        delta = super().get_delta_weight(adapter)  # type: ignore[misc]
        state = self._layerpeft
        if adapter == state.adapter and state.beside:
            left, right = state.beside[0]
            delta = delta + (left @ right).to(delta)
        return delta

    @torch.no_grad()
    def trained_change(self: Any) -> tuple[float, float]:
        """(‖ΔW‖², ‖W‖²) of all that was trained, folds included, against the original weight."""
        state = self._layerpeft
        left, right = projection.held(self)
        before = state.original
        if before is None:
            before = projection.weight_of(self) if state.experts else dequantized(self.get_base_layer())
        change = sum(float((left[s].double() @ right[s].double()).square().sum()) for s in state.slots)
        return change, sum(float(before[s].double().square().sum()) for s in state.slots)

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output; over a quantized weight the folds are a second branch."""
        if not torch.compiler.is_compiling():
            projection.unscale(self)
        state = self._layerpeft
        if _in_one(self, x, args, kwargs):
            y = self.base_layer(x)
            z = self.lora_A[state.adapter](x)
            left = self.lora_B[state.adapter].weight.t()
            y = torch.addmm(y.flatten(0, -2), z.flatten(0, -2), left, alpha=self.scaling[state.adapter]).view_as(y)
        else:
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if state.adapter not in self.active_adapters or self.disable_adapters or self.merged:
            return y
        if state.beside:
            left, right = state.beside[0]
            y = y + linear(linear(x.to(left.dtype), right), left).to(y.dtype)
        if state.watched and state.watcher is not None and self.training and torch.is_grad_enabled():
            y = state.watcher(self, y, x)
        return y


def _in_one(layer: Any, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the branch can be added by the very product that makes it, which saves two passes over the output."""
    weight = layer.lora_B[layer._layerpeft.adapter].weight if not layer.merged else None
    return (
        weight is not None
        and not args
        and not kwargs
        and not layer.disable_adapters
        and layer.active_adapters == [layer._layerpeft.adapter]
        and x.dim() > 1
        and x.dtype == weight.dtype == getattr(getattr(layer.base_layer, "weight", None), "dtype", None)
        and not torch.is_autocast_enabled(x.device.type)
    )


class ProjectedLinear(Projected, LoraLinear):
    """A linear, or Conv1D, trained by projection."""


_CLASSES: dict[type, type] = {LoraLinear: ProjectedLinear}


def project(layer: Any, state: Projection, becomes: type | None = None) -> None:
    """Turns a LoRA module into a projected one: random orthonormal bases, a zero trained factor, and its gradient unscaled.

    `becomes`: its class from now on, where it is not made from the module's own.
    """
    kind = type(layer)
    if becomes is not None:
        layer.__class__ = becomes
    elif not issubclass(kind, Projected):
        layer.__class__ = _CLASSES.setdefault(kind, type(f"Projected{kind.__name__}", (Projected, kind), {}))
    layer._layerpeft = state
    frozen = "lora_A" if state.side == "right" else "lora_B"
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, state.adapter: (frozen,)}
    fixed, trained = projection.fixed_of(layer), projection.trained_of(layer)
    fixed.requires_grad_(False)
    if fixed.device.type != "meta":
        rank, size = projection.basis_of(layer).shape[-2:]
        with torch.no_grad():
            trained.zero_()
        for slot in state.slots:
            key = f"{state.key}|first" + (f"|{slot}" if state.experts else "")
            projection.set_basis(layer, random_basis(key, rank, size, fixed), slot)
    projection.unscale(layer)
