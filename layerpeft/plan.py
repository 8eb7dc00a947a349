"""What training will cost, before any weight is loaded: the model is built without storage, and one step of it is traced."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layerpeft import backward, choose
from layerpeft.configs import LayerLoraConfig, target_names
from layerpeft.errors import ConfigError, LayerpeftError, unknown
from layerpeft.integrations.tracing import as_traced
from layerpeft.layers import LayerMap, base_of, layer_map
from layerpeft.scores import Scores
from layerpeft.selection import Select, how_many
from layerpeft.targets import exclusions, match_targets

# bytes of optimizer state per trained element, besides the weight itself
STATES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "sgd": 0,
    "rmsprop": 4,
    "adagrad": 4,
}


@dataclass(frozen=True)
class PlanRow:
    """One layer: whether it trains, with how many tensors' elements, and its weights in bytes."""

    layer: int
    name: str
    trains: bool
    trainable: int
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """Bytes by part, operations of one step, where the backward pass stops and why."""

    rows: tuple[PlanRow, ...]
    trainable: int
    total: int
    parts: Mapping[str, int]
    flops: int
    flops_full: int
    stop: backward.Stop
    assumed: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Weights, gradients, optimizer states and activations together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan(
    model: nn.Module | str | Path,
    config: peft.PeftConfig,
    *,
    batch_size: int = 8,
    length: int = 512,
    optimizer: str = "adamw_torch",
    checkpointing: bool = False,
) -> Plan:
    """What one training step costs, without loading a weight.

    `model`: a transformers model (only its config and dtype are read), or the folder or name of a language model;
    `batch_size` rows of `length` tokens. Activations count the peak of what one forward and backward pass makes.
    Raises: LayerpeftError for a config that does not fit the model, and ConfigError for an unknown optimizer.
    """
    if optimizer not in STATES:
        raise ConfigError(unknown("optimizer", optimizer, STATES))
    with torch.device("meta"):
        empty = _built(model)
        resolved, assumed = _resolved(config, empty)
        wrapped: Any = peft.get_peft_model(empty, resolved).train()
        stop = _install(wrapped, resolved)
        if checkpointing:
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        full = _built(model).train()
    with as_traced(wrapped):
        peak, flops = trace(wrapped, batch_size, length)
    with as_traced(full):
        everything = trace(full, batch_size, length)[1]
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trainable)
    parts = {
        "weights": sum(t.numel() * t.element_size() for t in [*wrapped.parameters(), *wrapped.buffers()]),
        "gradients": gradients,
        "optimizer": STATES[optimizer] * sum(p.numel() for p in trainable),
        "activations": peak,
    }
    return Plan(
        rows=_rows(wrapped),
        trainable=sum(p.numel() for p in trainable),
        total=sum(p.numel() for p in wrapped.parameters()),
        parts=parts,
        flops=flops,
        flops_full=everything,
        stop=stop,
        assumed=(*assumed, f"{batch_size} rows of {length} tokens, {optimizer}"),
    )


def _built(model: nn.Module | str | Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    if isinstance(model, str | Path):
        try:
            found = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no model config at {model!s}: {' '.join(str(error).split())[:200]}") from error
        return AutoModelForCausalLM.from_config(found, dtype=found.dtype or torch.float32)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"plan takes a model or the folder or name of one, not {type(model).__name__}")
    base = base_of(model)
    found = getattr(base, "config", None)
    if not isinstance(found, PretrainedConfig):
        raise ConfigError(f"plan builds the model anew from its config, and {type(base).__name__} has none")
    return type(base)(copy.deepcopy(found)).to(next(base.parameters()).dtype)


def _resolved(config: peft.PeftConfig, model: nn.Module) -> tuple[peft.PeftConfig, tuple[str, ...]]:
    """The config with its layers fixed. A choice that needs weights or data is taken at its costliest."""
    if not isinstance(config, LayerLoraConfig):
        return copy.deepcopy(config), ()
    select = Select.parse(config.select)
    if isinstance(select.by, Scores) or choose.needs(select) == "nothing":
        return config.resolve(model), ()
    layers = layer_map(model, select.stack)
    targets = match_targets(
        layers,
        target_names(config, layers),
        exclusions(config.exclude_modules, model, layers),
        config.target_parameters,
    )
    among = choose.candidates(select, layers, targets)
    count = how_many(select.keep, len(among)) or len(among)
    twin = copy.deepcopy(config)
    twin.select = {"layers": among[:count], "stack": layers.stack}
    note = f"which {count} of {len(among)} layers is not known yet: the lowest are assumed, the costliest choice"
    return twin.resolve(model), (note,)


def _install(wrapped: nn.Module, config: peft.PeftConfig) -> backward.Stop:
    record = getattr(config, "_layerpeft", None)
    stack = record.selection.stack if record is not None else None
    try:
        return backward.install(wrapped, stack)
    except LayerpeftError:
        return backward.Stop(None, "the model has no repeated blocks")


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at the peak; those that exist already do not count."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.held, self.now, self.peak = known, {}, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.held:
                    self.held[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._drop, key)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)


def trace(model: nn.Module, batch_size: int, length: int) -> tuple[int, int]:
    """(peak bytes of activations and temporaries, floating-point operations) of one forward and backward pass."""
    device = next(model.parameters()).device
    ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
    head: Any = getattr(base_of(model), "get_output_embeddings", lambda: None)()
    labels = ids if head is not None else ids[:, 0]  # a language model has a label per token, a classifier one per row
    extra = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) else {}
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    live = Live(known)
    with FlopCounterMode(display=False) as counter, _no_collection(), live:
        try:
            model(input_ids=ids, labels=labels, **extra).loss.backward()
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ConfigError(
                "plan traces one step of a language model or a sequence classifier on token ids; "
                f"{type(base_of(model)).__name__} cannot be traced that way ({' '.join(str(error).split())[:200]})"
            ) from error
    made = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return max(0, live.peak - made), int(counter.get_total_flops())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's cycle collector still, so that the same model gives the same peak every time."""
    gc.collect()
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _rows(wrapped: nn.Module) -> tuple[PlanRow, ...]:
    base = base_of(wrapped)
    try:
        layers: LayerMap = layer_map(base)
    except LayerpeftError:
        return ()
    found = []
    for layer in layers.layers:
        block = list(base.get_submodule(layer.name).parameters())
        trained = sum(p.numel() for p in block if p.requires_grad)
        size = sum(p.numel() * p.element_size() for p in block if not p.requires_grad)
        found.append(PlanRow(layer.index, layer.name, trained > 0, trained, size))
    return tuple(found)


def _lines(found: Plan) -> list[str]:
    lines = [f"{'layer':>5}  {'name':<28}  trains  {'trainable':>12}  {'weights':>10}"]
    for row in found.rows:
        mark = "yes" if row.trains else "no"
        lines.append(
            f"{row.layer:>5}  {row.name:<28}  {mark:<6}  {row.trainable:>12,}  {size_text(row.weight_bytes):>10}"
        )
    lines.append(f"trainable: {found.trainable:,} of {found.total:,} ({100 * found.trainable / found.total:.2f} %)")
    lines += [f"{name + ':':<14}{size_text(size):>10}" for name, size in found.parts.items()]
    lines.append(f"{'together:':<14}{size_text(found.peak_bytes):>10}")
    where = "the bottom" if found.stop.layer is None else f"layer {found.stop.layer}"
    lines.append(f"backward pass: down to {where} ({found.stop.why})")
    lines.append(f"operations per step: {found.flops:.3g}, {found.flops / found.flops_full:.2f} of training everything")
    return lines + [f"assumed: {text}" for text in found.assumed]


def size_text(size: float) -> str:
    """Bytes as a person reads them (binary units)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
