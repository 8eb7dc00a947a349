"""A linear with a scale and a bias of what it gives out, as a variant of PEFT's LoRA module, both factors of which are zero; and a
norm whose copy trains.

y = s ⊙ (W x + b₀ + b), s and b (out,), 1 and 0 at the start (LLaMA-Adapter V2, arXiv 2304.15010, in which b₀ is part of b): so W
becomes s ⊙ W by rows, and the bias s ⊙ (b₀ + b).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerpeft.errors import ConfigError
from layerpeft.integrations.peft import LoraVariant, ModulesToSaveWrapper, dequantized, lora_layers, unwrap_layer
from layerpeft.model.names import clean
from layerpeft.model.weights import change_of, in_pieces
from layerpeft.tuners.beside import rest_factors

# Where a module keeps them, by adapter: trainers that cast adapters to bfloat16, in which 1 + 1e-3 is 1, leave what lies here
GROUP = "lora_magnitude_vector"
NO_BIAS = (
    "this linear has no bias that a learned one could go into: layerpeft merge gives biases to models whose config has a place for "
    "them, such as Llama's"
)


class Unlocked(nn.Module):
    """The scale and, unless they are left out, the bias (`shift`) of one adapter in one linear, (out,) each, in float32.

    `before`: weight and bias as they were, while they are merged.
    """

    shift: nn.Parameter | None

    def __init__(self, size: int, shifts: bool, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, device=device, dtype=torch.float32))
        empty = torch.zeros(size, device=device, dtype=torch.float32) if shifts else None
        self.register_parameter("shift", None if empty is None else nn.Parameter(empty))
        self.before: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """What the linear gives out (…, out), in its own type."""
        moved = given if self.shift is None else given + self.shift
        return (self.scale * moved).to(given.dtype)


def bias_of(scale: torch.Tensor, shift: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
    """The bias (out,) that they come to, in float32 or better; None where there is none."""
    kind = torch.float32 if old is None else torch.promote_types(old.dtype, torch.float32)
    parts = [t.detach().to(scale.device, kind) for t in (old, shift) if t is not None]
    return scale.detach().to(kind) * torch.stack(parts).sum(0) if parts else None


def folded(
    linear: nn.Module, scale: torch.Tensor, shift: torch.Tensor | None, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state`, the tensors of a linear, with scale and bias in weight and bias, each in its own type; numbers in float32 or better.

    Raises: ValueError where they are not finite.
    """
    old = state["weight"]
    rows = scale.detach().to(old.device, torch.promote_types(old.dtype, torch.float32))
    found = {"weight": old.to(rows) * (rows if isinstance(linear, Conv1D) else rows[:, None])}
    bias = bias_of(scale, shift, state.get("bias"))
    found |= {} if bias is None else {"bias": bias}
    found = {n: t.to(state.get(n, old).dtype) for n, t in found.items()}
    wrong = next((n for n, t in found.items() if not torch.isfinite(t).all()), None)
    if wrong is not None:
        raise ValueError(f"the {wrong} is not finite")
    return {**state, **found}


class UnlockVariant(LoraVariant):
    """What such a module does otherwise than PEFT's own."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: `place` has done it."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The output, scaled and moved."""
        return module.lora_magnitude_vector[active_adapter](result)

    @staticmethod
    @torch.no_grad()
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight, and, in place, the bias. Raises: ConfigError where there is none; ValueError."""
        linear, own = module.get_base_layer(), module.lora_magnitude_vector[active_adapter]
        bias = getattr(linear, "bias", None)
        if bias is None and own.shift is not None:
            raise ConfigError(NO_BIAS)
        state = {"weight": orig_weight} | ({} if bias is None else {"bias": bias})
        found = folded(linear, own.scale, own.shift, state)
        own.before = (orig_weight.detach().clone(), None if bias is None else bias.detach().clone())
        if bias is not None:
            bias.data = found["bias"]
        return found["weight"]

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data = UnlockVariant.merge_safe(module, active_adapter, orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Both are what they were, to the bit."""
        linear, own = module.get_base_layer(), module.lora_magnitude_vector[active_adapter]
        (weight, bias), own.before = own.before, None
        if bias is not None:
            linear.bias.data = bias.to(linear.bias)
        return weight.to(orig_weight)

    @staticmethod
    @torch.no_grad()
    def trained_change(module: Any, adapter: str) -> tuple[float, float]:
        """(‖ΔW‖² + ‖Δb‖², ‖W‖² + ‖b₀‖²) of what it comes to, against the linear as it is."""
        linear, own = module.get_base_layer(), module.lora_magnitude_vector[adapter]
        if own.before is not None:
            weight, bias = own.before
        else:
            weight, bias = dequantized(linear), getattr(linear, "bias", None)
        rows = _squares(weight.T if isinstance(linear, Conv1D) else weight)
        moved = bias_of(own.scale, own.shift, bias)
        old = torch.zeros_like(own.scale) if bias is None else bias.float()
        change = ((own.scale - 1).square() * rows.to(own.scale)).sum()
        change += 0 if moved is None else (moved - old.to(moved)).square().sum()
        return float(change), float(rows.sum() + old.square().sum())


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Σ of squares of each row (out,), in float32."""
    return torch.cat([piece.float().square().sum(1) for piece in in_pieces(rows)])


def place(layer: Any, adapter: str, shifts: bool, inference: bool = False) -> Unlocked:
    """Turns a LoRA module's adapter, whose factors become zero and stay so, into a scale of 1 and a bias of 0."""
    device = rest_factors(layer, adapter, UnlockVariant())
    if GROUP not in layer.adapter_layer_names:
        layer.adapter_layer_names = (*layer.adapter_layer_names, GROUP)
    own = layer.lora_magnitude_vector[adapter] = Unlocked(layer.out_features, shifts, device)
    layer.use_dora[adapter] = False
    own.requires_grad_(not inference)
    return own


def unlocked(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The linears with a scale of this adapter, by their names in the model as it is."""
    found = lora_layers(model, adapter).items()
    return {n: m for n, m in found if isinstance(getattr(m, GROUP)._modules.get(adapter), Unlocked)}


@torch.no_grad()
def magnitude(linear: nn.Module, scale: torch.Tensor) -> torch.Tensor:
    """DoRA's magnitudes (out,) that come to this scale over the weight as it is: `s ‖W‖` by rows."""
    weight = dequantized(linear)
    rows = weight.T if isinstance(linear, Conv1D) else weight
    return scale * torch.linalg.norm(rows, dim=1).to(scale)


class UnlockedNorm(ModulesToSaveWrapper):
    """A norm of which PEFT trains a copy, in float32: in 16 bits the steps of a weight near 1 are lost.

    `rests`: it does not just now, whatever PEFT switches off and on. `always`: it lies in no layer that is chosen from.
    """

    rests = always = False

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.settle()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.settle()

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """None: PEFT fails without a word where a file lacks what the map names."""
        return {}

    def _forward_wrapped(self, given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The copy's, in the type of what it is given."""
        copy = self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module
        kind = next(copy.parameters()).dtype
        return copy(given.to(kind), *args, **kwargs).to(given.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The norm as it was trained, in its own type, or as it was."""
        trained = [n for n in adapter_names or self.active_adapters if n in self.modules_to_save]
        if not merge or not trained:
            return self.original_module
        return self.modules_to_save[trained[0]].to(next(self.original_module.parameters()).dtype)

    def settle(self) -> None:
        """Freezes the copy where it rests."""
        if self.rests:
            self.modules_to_save.requires_grad_(False)

    def trained_change(self) -> tuple[float, float]:
        """(‖Δw‖², ‖w‖²) of the copy against the norm."""
        pairs = zip(self.original_module.parameters(), self.modules_to_save.parameters(), strict=True)
        parts = [change_of(old, new) for old, new in pairs]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)


def adopt(model: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """Lets copies of norms train in float32, and those of these names rest when they are told to."""
    wanted = set(names)
    module: Any
    for path, module in model.named_modules():
        mine = type(module) is ModulesToSaveWrapper and adapter in module.modules_to_save
        if mine and is_norm(module.original_module):
            module.__class__ = UnlockedNorm
            module.__dict__["always"] = clean(path) not in wanted
            copy = module.modules_to_save[adapter]
            copy.to(torch.promote_types(next(copy.parameters()).dtype, torch.float32))


def norms(model: nn.Module, adapter: str, always: bool = False) -> dict[str, UnlockedNorm]:
    """Those of this adapter, by their names in the model as it is; `always`: with those that lie in no layer."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, UnlockedNorm))
    return {n: m for n, m in found if adapter in m.modules_to_save and (always or not m.always)}


def is_norm(module: nn.Module) -> bool:
    """Whether it is called so, and holds vectors alone, and no running statistics."""
    held = [p for p in module._parameters.values() if p is not None]
    plain = held and not module._modules and not module._buffers and all(p.ndim <= 1 for p in held)
    return bool(plain) and "norm" in type(module).__name__.lower()


def trained(norm: UnlockedNorm, adapter: str) -> dict[str, nn.Parameter]:
    """The copy's tensors, by name."""
    return dict(norm.modules_to_save[adapter].named_parameters())


def take_off(model: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """Linears and norms of these names, in the model as it is, are what they were."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, UnlockedNorm):
            above, _, child = name.rpartition(".")
            setattr(model.get_submodule(above), child, module.original_module)
        else:
            unwrap_layer(model, name, adapter)
