"""An attention's output projection with offsets of its heads: a variant of PEFT's LoRA module, both factors of which are zero.

An offset v of head h, added to what the projection W (out, in) reads, adds the constant `W[:, h] v` to what it gives out, whatever
the token. So the projection runs as it is, over any form of W, and the constant is added to its output.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerpeft.errors import ConfigError
from layerpeft.integrations.peft import LoraVariant, dequantized
from layerpeft.model.heads import columns_of, name_of
from layerpeft.model.names import clean
from layerpeft.model.weights import in_pieces
from layerpeft.tuners.beside import rest_factors

GROUP = "lora_offset"  # where a module keeps them, by adapter; PEFT knows names that begin so as an adapter's
NO_BIAS = (
    "this projection has no bias that offsets of heads could go into: layerpeft merge gives biases to models whose config has a "
    "place for them, such as Llama's; where there is none, keep the adapter as it is"
)
PACKED = (
    "offsets of heads are not merged into a quantized projection, whose weight PEFT would round again; merge the saved adapter "
    "into the base in 16 bit: layerpeft merge"
)


class Offsets(nn.Module):
    """Those of one adapter in one projection: a vector (size,) for each head that may train. `resting`: heads that do not now.

    `before`: the bias as it was, while the offsets are merged into it.
    """

    def __init__(self, heads: Iterable[int], size: int, device: torch.device) -> None:
        super().__init__()
        self.size, self.resting, self.before = size, frozenset[int](), None
        for head in heads:
            self.register_parameter(f"head_{head}", nn.Parameter(torch.zeros(size, device=device)))

    def items(self) -> Iterator[tuple[int, nn.Parameter]]:
        """The heads by their numbers, in the order they were asked for."""
        for name, parameter in self._parameters.items():
            assert parameter is not None
            yield int(name.removeprefix("head_")), parameter

    def rest(self) -> None:
        """Freezes those that do."""
        for head, parameter in self.items():
            if head in self.resting:
                parameter.requires_grad_(False)

    def drop(self, heads: Iterable[int]) -> None:
        """Takes these off."""
        for head in heads:
            delattr(self, f"head_{head}")

    def constant(self, projection: nn.Module, given: Mapping[int, torch.Tensor] | None = None) -> torch.Tensor:
        """What they (or those `given`, by head) add to the output of the projection, (out,), in float32 or better."""
        rows, vectors = _rows(projection), dict(self.items()) if given is None else given
        held = [(columns_of(h, self.size), v) for h, v in vectors.items()]
        kind = torch.promote_types(torch.promote_types(rows.dtype, held[0][1].dtype), torch.float32)
        read = torch.cat([rows[:, place] for place, _ in held], 1).to(kind)
        with torch.autocast(rows.device.type, enabled=False):
            return read @ torch.cat([v for _, v in held]).to(rows.device, kind)


def _rows(projection: nn.Module) -> torch.Tensor:
    """The weight of a projection as numbers, (out, in)."""
    weight = dequantized(projection)
    return weight.T if isinstance(projection, Conv1D) else weight


class HeadVariant(LoraVariant):
    """What such a module does otherwise than PEFT's own."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: `place` has done it."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The output with the constant, as PEFT adds the bias of a factor."""
        return result + constant_of(module, active_adapter)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight as it is; the bias takes the constant. Raises: ConfigError where there is none, or the weight is packed."""
        projection, offsets = module.get_base_layer(), offsets_of(module)[active_adapter]
        if not projection.weight.is_floating_point():
            raise ConfigError(PACKED)
        if projection.bias is None:
            raise ConfigError(NO_BIAS)
        merged = projection.bias + constant_of(module, active_adapter)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the offsets of {active_adapter} are not finite")
        offsets.before = projection.bias.detach().clone()
        projection.bias.data = merged.detach().to(projection.bias.dtype)
        return orig_weight

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        HeadVariant.merge_safe(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The bias is what it was, to the bit."""
        offsets, bias = offsets_of(module)[active_adapter], module.get_base_layer().bias
        if offsets.before is not None:
            bias.data, offsets.before = offsets.before.to(bias), None
        return orig_weight


class Offset:
    """What such a module says of itself otherwise than PEFT's own."""

    def _freeze_non_trainable_peft_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        """After PEFT has let gradients into all of an adapter, as when it is switched on again."""
        super()._freeze_non_trainable_peft_weights(*args, **kwargs)  # type: ignore[misc]
        for offsets in offsets_of(self).values():
            offsets.rest()

    def reset_lora_parameters(self: Any, adapter_name: str, init_lora_weights: Any) -> None:
        """Of offsets nothing is left, and the factors stay zero."""
        if adapter_name not in offsets_of(self):
            super().reset_lora_parameters(adapter_name, init_lora_weights)  # type: ignore[misc]
        elif init_lora_weights is not False:
            with torch.no_grad():
                for _, vector in offsets_of(self)[adapter_name].items():
                    vector.zero_()


@cache
def _class_of(kind: type) -> type:
    """That class over a class of PEFT's; it is pickled by this, since no module has it under its name."""
    pickled = {"__reduce_ex__": lambda self, _: (_blank, (kind,), self.__getstate__())}
    return type(f"Offset{kind.__name__}", (Offset, kind), pickled)


def _blank(kind: type) -> Any:
    return object.__new__(_class_of(kind))


def place(layer: Any, adapter: str, heads: Iterable[int], size: int, inference: bool = False) -> Offsets:
    """Turns a LoRA module's adapter, whose factors become zero and stay so, into offsets of these heads, which are zero, too."""
    if not hasattr(layer, GROUP):
        setattr(layer, GROUP, nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, GROUP)
    device = rest_factors(layer, adapter, HeadVariant())
    offsets = offsets_of(layer)[adapter] = Offsets(heads, size, device)
    kind = type(layer)
    layer.__class__ = kind if issubclass(kind, Offset) else _class_of(kind)
    offsets.requires_grad_(not inference)
    return offsets


def offsets_of(layer: Any) -> Any:
    """The offsets in a module, by adapter."""
    return getattr(layer, GROUP, {})


def constant_of(layer: Any, adapter: str) -> torch.Tensor:
    """What an adapter adds to the output of a module, (out,)."""
    return offsets_of(layer)[adapter].constant(layer.get_base_layer()) * layer.scaling[adapter]


def head_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The modules with offsets of this adapter, by their names in the model as it is."""
    return {n: m for n, m in model.named_modules() if adapter in offsets_of(m)}


class Part(nn.Module):
    """One head of a module, as a report asks for it: how far it has changed."""

    def __init__(self, layer: Any, adapter: str, head: int, offset: nn.Parameter) -> None:
        super().__init__()
        self.offset, self._of = offset, (layer, adapter, head)  # in a tuple, since it is no part of this one

    @torch.no_grad()
    def trained_change(self) -> tuple[float, float]:
        """(‖W v‖², ‖W‖²) over the head's columns W (out, size): what is added to the output, beside what reads the head."""
        layer, adapter, head = self._of
        rows = _rows(layer.get_base_layer())[:, columns_of(head, offsets_of(layer)[adapter].size)]
        change = rows.float() @ self.offset.float()
        return float(change.square().sum()), sum(float(piece.square_().sum()) for piece in in_pieces(rows))


def parts(model: nn.Module, adapter: str) -> dict[str, nn.Module]:
    """Every head of it."""
    found: dict[str, nn.Module] = {}
    for name, layer in head_layers(model, adapter).items():
        found |= {name_of(clean(name), h): Part(layer, adapter, h, v) for h, v in offsets_of(layer)[adapter].items()}
    return found
