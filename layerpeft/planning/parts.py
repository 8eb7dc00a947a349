"""What a planned training takes besides weights and activations: gradients, optimizer states, masters; and what sleeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError
from layerpeft.integrations.tracing import stand_in, weight_bytes
from layerpeft.model import precisions
from layerpeft.model.layers import LayerMap, base_of, find_module
from layerpeft.model.names import clean, lying_in
from layerpeft.planning import optimizer_bytes
from layerpeft.quantization import apply
from layerpeft.quantization.apply import Quantized
from layerpeft.text import size_text
from layerpeft.training.backward import Stop
from layerpeft.training.distill import Distill
from layerpeft.training.method import Method, Tensors


@dataclass(frozen=True)
class Teacher:
    """What teaches beside training. `weights`: bytes of its own, none where it is the model itself; `layers`: how many are learned
    from; `params`: elements of all layers' matrices, which a forward pass multiplies."""

    asked: Distill
    weights: int
    layers: int
    width: int
    vocabulary: int
    itemsize: int
    params: int

    def step(self, rows: int, length: int) -> tuple[int, int]:
        """Bytes that a step holds for it besides, and its operations."""
        held = self.asked.held(rows, length, self.layers, self.width, self.vocabulary, self.itemsize)
        return held, 2 * self.params * rows * length


@dataclass(frozen=True)
class Wrapped:
    """An adapter on a model without storage: its method, its layers, what had to be assumed, where the backward pass stops.
    `resting`: names of parameters of layers that sleep at the costliest moment; whether optimizers keep states of those."""

    model: Any
    method: Method
    layers: LayerMap | None
    assumed: tuple[str, ...]
    stop: Stop
    resting: frozenset[str] = frozenset()
    keeps_states: bool = False
    teacher: Teacher | None = None

    @property
    def weights(self) -> int:
        """Bytes of weights, those included that are kept as they were, and a teacher's."""
        own = weight_bytes(self.model) + sum(w.nbytes for w in self.method.beside())
        return own + (self.teacher.weights if self.teacher is not None else 0)

    def taught(self, rows: int, length: int) -> tuple[int, int]:
        """Bytes and operations of a step for a teacher."""
        return self.teacher.step(rows, length) if self.teacher is not None else (0, 0)


@dataclass(frozen=True)
class Training:
    """Elements that train, and bytes of their gradients, of optimizer states, and of float32 masters."""

    trainable: int
    gradients: int
    states: int
    masters: int


def training(wrapped: Wrapped, optimizer: str, optim_args: str | None) -> Training:
    """What training takes besides the weights and activations."""
    trained = [p for p in wrapped.model.parameters() if p.requires_grad]
    resting = [p for n, p in wrapped.model.named_parameters() if n in wrapped.resting]
    stateful = trained + (resting if wrapped.keeps_states else [])
    copied = 0
    if wrapped.method.masters is not None:
        copied = sum(4 * p.numel() for p in trained if p.element_size() < 4)
        stateful = [torch.empty_like(p, dtype=torch.float32) if p.element_size() < 4 else p for p in stateful]
    return Training(
        sum(p.numel() for p in trained),
        # around a step gradients are there in both types
        sum(p.numel() * p.element_size() for p in trained) + copied,
        optimizer_bytes.state_bytes(optimizer, stateful, optim_args),
        copied,
    )


def put_to_sleep(wrapped: nn.Module, layers: Sequence[str], tensors: Tensors) -> frozenset[str]:
    """Keeps gradients out of layers that do not train at the costliest moment; names of what would train in them.

    `tensors`: those of the adapter, by target.
    """
    rests = lying_in(layers)
    held = {id(p) for n, p in base_of(wrapped).named_parameters() if p.requires_grad and rests(clean(n))}
    held |= {id(p) for t, group in tensors.items() if rests(t) for p in group.values() if p.requires_grad}
    found = {n: p for n, p in wrapped.named_parameters() if id(p) in held}
    for parameter in found.values():
        parameter.requires_grad_(False)
    return frozenset(found)  # by name, since tracing puts other tensors in their place


def half(wrapped: nn.Module) -> None:
    """TRL's trainers train adapters of a quantized base in bfloat16, all but DoRA's magnitudes."""
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def store(empty: nn.Module, wanted: Quantized, early: bool) -> tuple[str, ...]:
    """Puts stand-ins where linears will be quantized, and says what that takes. `early`: known before weights are.
    Raises: ConfigError for a missing package, or what cannot be packed so."""
    missing = precisions.missing_packages(wanted.assignment.values())
    if missing:
        raise ConfigError(f"quantization needs {' and '.join(missing)}: pip install 'layerpeft[quant]'")
    unfit = [n for n, p in wanted.assignment.items() if not _fits(find_module(empty, n), p, wanted)]
    if unfit:
        raise ConfigError(
            f"quantization: {unfit[0]} and {len(unfit) - 1} more: {wanted.storage} does not fill its rows"
        )
    before, largest = weight_bytes(empty), 0
    for name, kind in wanted.assignment.items():
        above, _, leaf = name.rpartition(".")
        parent = find_module(empty, above)
        old: Any = parent._modules[leaf]
        largest = max(largest, old.weight.nbytes)
        size = precisions.stored_bytes(
            kind, old.out_features, old.in_features, wanted.storage, old.weight.element_size()
        )
        packed = precisions.PRECISIONS[kind].package == "hqq"  # which knows no meta device
        new = parent._modules[leaf] = old if packed else precisions.quantized_linear(old, kind, wanted.storage)
        stand_in(new, size)
    apply.mark_kinds(empty, wanted.modules.values())
    after = weight_bytes(empty)
    loading = (
        f"one that layerpeft loads (recipes, load_model) at {size_text(after + largest)}"
        if early
        else "and so does one that layerpeft loads, since weights or data decide which"
    )
    return (
        f"{wanted.why}; weights {size_text(before)} as loaded, {size_text(after)} then",
        f"while quantizing, a model that is loaded already peaks at {size_text(before + largest)}, {loading}",
        *(() if early or not wanted.has_budget else ("which linears get which bits is not known yet: equal scores",)),
    )


def _fits(module: Any, precision: str, wanted: Quantized) -> bool:
    return precisions.fits(precision, module.out_features, module.in_features, wanted.storage)
