"""What a planned training takes besides weights and activations: gradients, optimizer states, masters; and what sleeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

from layerpeft.errors import ConfigError
from layerpeft.integrations.tracing import is_stand_in, stand_in, weight_bytes
from layerpeft.model import precisions
from layerpeft.model.layers import base_of, find_module
from layerpeft.planning import optimizer_bytes
from layerpeft.quantization import apply
from layerpeft.quantization.apply import Quantized
from layerpeft.text import size_text
from layerpeft.tuners.assume import Asleep
from layerpeft.tuners.full.config import FullLoraConfig
from layerpeft.tuners.full.layer import open_all, wrappers
from layerpeft.tuners.galore.projection import projections, weight_of

_RESTING = "_layerpeft_resting"  # in a planned model's own dict: names of the parameters of layers that sleep


@dataclass(frozen=True)
class Training:
    """Elements that train, and bytes of their gradients, of optimizer states, and of float32 masters."""

    trainable: int
    gradients: int
    states: int
    masters: int


def training(wrapped: nn.Module, optimizer: str, optim_args: str | None) -> Training:
    """What training takes besides the weights and activations."""
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    asleep: Asleep | None = getattr(config_of(wrapped), "_layerpeft_asleep", None)
    resting = [p for n, p in wrapped.named_parameters() if n in wrapped.__dict__.get(_RESTING, ())]
    stateful = trained + (resting if asleep is not None and asleep.keeps_states else [])
    copied = 0
    if getattr(getattr(config_of(wrapped), "_layerpeft_full", None), "master_weights", False):
        copied = sum(4 * p.numel() for p in trained if p.element_size() < 4)
        stateful = [torch.empty_like(p, dtype=torch.float32) if p.element_size() < 4 else p for p in stateful]
    return Training(
        sum(p.numel() for p in trained),
        # around a step gradients are there in both types
        sum(p.numel() * p.element_size() for p in trained) + copied,
        optimizer_bytes.state_bytes(optimizer, stateful, optim_args),
        copied,
    )


def opened(wrapped: nn.Module, resolved: peft.PeftConfig) -> tuple[str, ...]:
    """Lets gradients into what trains at the costliest moment, and nowhere else; what is to be said of it."""
    notes: tuple[str, ...] = ()
    if isinstance(resolved, FullLoraConfig):
        open_all(wrapped, "default")
        held = {id(t): t.nbytes for w in wrappers(wrapped, "default") for t in [*w.parameters(), *w.buffers()]}
        notes = (
            f"the original weights of what was ever trained are kept on the CPU (up to {size_text(sum(held.values()))})",
        )
    asleep: Asleep | None = getattr(resolved, "_layerpeft_asleep", None)
    if asleep is not None:
        base = base_of(wrapped)
        held = {id(p) for name in asleep.layers for p in base.get_submodule(name).parameters() if p.requires_grad}
        found = {n: p for n, p in wrapped.named_parameters() if id(p) in held}
        for parameter in found.values():
            parameter.requires_grad_(False)
        wrapped.__dict__[_RESTING] = set(found)  # by name, since tracing puts other tensors in their place
    return notes


def config_of(wrapped: nn.Module) -> Any:
    """The live config of the one adapter; None where there is none."""
    return next(iter(getattr(wrapped, "peft_config", {}).values()), None)


def half(wrapped: nn.Module) -> None:
    """TRL's trainers train adapters of a quantized base in bfloat16, all but DoRA's magnitudes."""
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def store(empty: nn.Module, wanted: Quantized, early: bool) -> tuple[str, ...]:
    """Puts stand-ins where linears will be quantized, and says what that takes. `early`: known before weights are.

    Raises: ConfigError for a missing package, or what cannot be packed so.
    """
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


def originals(wrapped: nn.Module) -> int:
    """Bytes of the weights as they were, which gradient projection keeps beside those that it folds into (`fold: beside`)."""
    found = [
        layer
        for _, layer in projections(wrapped, "default")
        if layer._layerpeft_projection.fold == "beside"
        and not is_stand_in(layer.get_base_layer())  # folds lie beside it
    ]
    return sum(weight_of(layer).nbytes for layer in found)
