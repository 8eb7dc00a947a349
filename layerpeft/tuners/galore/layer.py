"""A module whose weight is trained by gradient projection: PEFT's LoRA module with one factor fixed, and the folds behind it."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from layerpeft.errors import ConfigError
from layerpeft.integrations.engines.known import is_cut
from layerpeft.integrations.peft import LoraLinear, dequantized
from layerpeft.integrations.torch import drop_hooks
from layerpeft.tuners.galore import projection
from layerpeft.tuners.galore.projection import Projection, show
from layerpeft.tuners.galore.saving import watch
from layerpeft.tuners.galore.subspace import random_basis

ONE_ONLY = (
    "a model has one adapter that is trained by projection, because its folds lie in the weights: {name!r} cannot be another, nor "
    "a copy of it. Where a trainer wants a copy of what was trained before (DPO without a reference model), merge it first "
    "(layerpeft merge, or merge_and_unload) and train a new adapter over that, or give the trainer a ref_model"
)
DIVIDED = (
    "{name} is divided among the processes, and what was trained cannot be merged, or scaled, in a part of it: save the adapter, "
    "and merge its folder (layerpeft merge FOLDER OUT), or load that with PeftModel.from_pretrained"
)
MIXED = (
    "adapter_names= mixes adapters within a batch, and what was trained lies in weights that all rows share; call the model once "
    "with the adapter and once within disable_adapter(), or load what save_pretrained wrote with PeftModel.from_pretrained"
)


class Projected:
    """What a projected module does otherwise than a LoRA module: the base comes back bit for bit when it is asked for."""

    _layerpeft: Projection

    def __setstate__(self: Any, state: Any) -> None:
        """A copy, maybe in another process."""
        super().__setstate__(state)  # type: ignore[misc]
        watch()

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

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """What was trained goes with its adapter, and the module is PEFT's own again."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        if adapter_name == self._layerpeft.adapter:
            release(self)

    def reset_lora_parameters(self: Any, adapter_name: str, init_lora_weights: Any) -> None:
        """Nothing is left of what was trained."""
        super().reset_lora_parameters(adapter_name, init_lora_weights)  # type: ignore[misc]
        if adapter_name == self._layerpeft.adapter and init_lora_weights is not False:
            projection.drop(self)
            begin(self)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """Casts and moves what lies beside the weight along with it; originals that are kept on the CPU stay there."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        state = self._layerpeft
        for name in ("original", "working"):
            kept = getattr(state, name)
            if kept is not None:
                setattr(state, name, fn(kept).to(kept.device) if state.fold == "base" else fn(kept))
        state.beside = [(fn(left), fn(right)) for left, right in state.beside]
        return self

    def set_adapter(self: Any, adapter_names: Any, inference_mode: bool = False) -> None:
        """The folds belong to one adapter: another one finds the original weight."""
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        state = getattr(self, "_layerpeft", None)
        if state is not None:
            show(self, working=state.adapter in self.active_adapters and not self.disable_adapters)

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Takes the running period into the weight; what the weight was is kept, so that it comes back bit for bit."""
        _refuse_merge(self)
        state = self._layerpeft
        if state.adapter in (adapter_names or self.active_adapters) and not self.merged:
            projection.keep_original(self)
        with state.inside():
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def unmerge(self: Any) -> None:
        """Forms the weight anew; nothing is taken off it, which would leave rounding."""
        if self.merged_adapters == [self._layerpeft.adapter]:
            self.merged_adapters.clear()
            projection.restart(self)
            return
        with self._layerpeft.inside():
            super().unmerge()  # type: ignore[misc]

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrapper: with all folds and the running period, or as it was in the beginning."""
        if merge:
            _refuse_merge(self)
            show(self, working=self._layerpeft.adapter in (adapter_names or self.active_adapters))
            with self._layerpeft.inside():
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        else:
            if self.merged:
                self.unmerge()
            show(self, working=False)
        return self.get_base_layer()

    def get_delta_weight(self: Any, adapter: str) -> torch.Tensor:
        """All that an adapter adds to the weight (of experts: in this period); in a merge, what the weight does not hold yet."""
        delta, state = super().get_delta_weight(adapter), self._layerpeft  # type: ignore[misc]
        asked = adapter == state.adapter and (state.merging or not state.experts)
        share = self.share(merging=state.merging) if asked else 0
        return delta + projection.as_stored(self, share * state.folds.sum().to(delta)) if share else delta

    def share(self: Any, merging: bool) -> float:
        """How much of the folds the weight lacks; more or less than nothing where PEFT's scale is not what was trained with."""
        state = self._layerpeft
        lacks = float(self.scaling[state.adapter]) / state.scale - (merging and not state.beside)
        if lacks and state.divided:
            raise ConfigError(DIVIDED.format(name=state.name))
        return lacks if lacks and state.folds.count else 0

    def _mixed_batch_forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise ConfigError(MIXED)

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
        state = self._layerpeft
        if not torch.compiler.is_compiling():
            projection.unscale(self)
            fixed, trained = projection.fixed_of(self), projection.trained_of(self)
            short = fixed.dtype.itemsize < trained.dtype.itemsize  # PEFT casts what does not train
            # what is gathered lies in storage that nobody may exchange
            if short and (state.watcher is None or not state.watcher.gathers()):
                fixed.data = fixed.data.to(trained.dtype)
        if _in_one(self, x, args, kwargs):
            y = self.base_layer(x)
            z = self.lora_A[state.adapter](x)
            left = self.lora_B[state.adapter].weight.t()
            y = torch.addmm(y.flatten(0, -2), z.flatten(0, -2), left, alpha=self.scaling[state.adapter]).view_as(y)
        else:
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if state.adapter not in self.active_adapters or self.disable_adapters or self.merged:
            return y
        share = self.share(merging=True)
        if share:
            left, right = state.beside[0] if state.beside else (t.to(y) for t in state.folds.factors())
            y = y + share * linear(linear(x.to(left.dtype), right), left).to(y.dtype)
        if state.watched and state.watcher is not None and self.training and torch.is_grad_enabled():
            y = state.watcher(self, y, x)
        return y


def _refuse_merge(layer: Any) -> None:
    if is_cut(projection.weight_of(layer)):
        raise ConfigError(DIVIDED.format(name=layer._layerpeft.name))


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


def _class_of(kind: type) -> type:
    """The projected class of a LoRA class; it is pickled by that, since no module has it under its name."""
    if kind not in _CLASSES:
        pickled = {"__reduce_ex__": lambda self, _: (_blank, (kind,), self.__getstate__())}
        _CLASSES[kind] = type(f"Projected{kind.__name__}", (Projected, kind), pickled)
    return _CLASSES[kind]


def _blank(kind: type) -> Any:
    return object.__new__(_class_of(kind))


def project(layer: Any, state: Projection, becomes: type | None = None) -> None:
    """Turns a LoRA module into a projected one: random orthonormal bases, a zero trained factor, and its gradient unscaled.

    `becomes`: its class from now on, where it is not made from the module's own.
    """
    kind = type(layer)
    if becomes is not None:
        layer.__class__ = becomes
    elif not issubclass(kind, Projected):
        layer.__class__ = _class_of(kind)
    layer._layerpeft = state
    watch()
    frozen = "lora_A" if state.side == "right" else "lora_B"
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, state.adapter: (frozen,)}
    begin(layer)


def begin(layer: Any) -> None:
    """The start of a run: random bases, and a trained factor that is zero."""
    state, fixed, trained = layer._layerpeft, projection.fixed_of(layer), projection.trained_of(layer)
    fixed.requires_grad_(False)
    if fixed.device.type != "meta":
        rank, size = projection.basis_of(layer).shape[-2:]
        with torch.no_grad():
            trained.zero_()
        for slot in state.slots:
            key = f"{state.key}|first" + (f"|{slot}" if state.experts else "")
            projection.set_basis(layer, random_basis(key, rank, size, fixed), slot)
    projection.unscale(layer)


def release(layer: Any) -> None:
    """Makes a projected module PEFT's own again, over the original weight; what was folded is gone."""
    state = layer._layerpeft
    projection.drop(layer)
    for factors in (layer.lora_A, layer.lora_B):
        if state.adapter in factors:
            drop_hooks(factors[state.adapter].weight, projection.Unscale)
    layer.frozen_peft_weight_names = {n: v for n, v in layer.frozen_peft_weight_names.items() if n != state.adapter}
    layer.__class__ = next(kind for kind in type(layer).__mro__ if not issubclass(kind, Projected))
    del layer._layerpeft
