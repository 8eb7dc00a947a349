"""What is and was trained: one row per layer, as a table, a CSV file and a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from layerpeft.errors import ConfigError, LayerMapError, unknown
from layerpeft.integrations.peft import BaseTunerLayer, dequantized, factors_of
from layerpeft.model.layers import base_of, layer_map
from layerpeft.model.names import clean, place_among
from layerpeft.model.weights import PIECE, squared_product
from layerpeft.text import grid, some

COLUMNS = ("layer", "name", "score", "chosen", "steps", "change")


def columns(unit: str) -> tuple[str, ...]:
    """The heads of a table of such units."""
    return (unit, *COLUMNS[1:])


# Methods whose get_delta_weight() is what merging adds to the weight. Others multiply it (OFT, BOFT, IA3, …).
_ADDITIVE = frozenset({"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "RANDLORA"})
# Initialisations that take the adapter's starting value out of the base weight, so that B·A is not the change.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Config fields of the LoRA variants that merge as plain LoRA does, and of DoRA, which has a formula of its own.
_KNOWN_VARIANTS = ("use_dora", "velora_config", "monteclora_config")


@dataclass(frozen=True)
class Row:
    """One layer, or unit: `steps` is None when nothing followed the training, `change` is ‖ΔW‖/‖W‖ over its chosen targets."""

    layer: int
    name: str
    score: float | None
    chosen: bool
    steps: int | None
    change: float | None


@dataclass(frozen=True)
class LayerReport:
    """The rows in layer order, who scored and why these were chosen, and what could not be measured."""

    rows: tuple[Row, ...]
    by: str | None
    why: str
    notes: tuple[str, ...] = ()
    unit: str = "layer"

    def __str__(self) -> str:
        lines = _table(self.rows, self.unit)
        lines.append(f"{self.by}: {self.why}" if self.by else self.why)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


class _Wrapped(NamedTuple):
    """A module (or a 3-D parameter) that an adapter wraps, by its name in the unwrapped model."""

    name: str
    layer: Any  # a tuner layer of peft


class _Unmeasured(Exception):
    """The change of a target cannot be told; the message says why."""


def layer_report(model: nn.Module, adapter_name: str = "default") -> LayerReport:
    """Which layers were chosen, trained and changed. Raises: ConfigError when there is no such adapter."""
    config = _config_of(model, adapter_name)
    record = getattr(config, "_layerpeft", None)
    wrapped = _wrapped(model, adapter_name)
    if record is not None and record.bound is not None:
        wrapped += [_Wrapped(name, module) for name, module in record.bound.modules().items()]
    if record is None:
        return _plain_report(model, config, adapter_name, wrapped)
    if record.selection is None:
        return LayerReport((), None, "the layers are not chosen yet: that happens just before the first optimizer step")
    selection = record.selection
    names = set(selection.targets)
    chosen = [target for target in wrapped if target.name in names]
    notes = []
    lost = sorted(names - {target.name for target in chosen})
    if lost:
        notes.append(f"{len(lost)} chosen targets carry no adapter {adapter_name!r}: {_three(lost)}")
    changes = _changes(_by_layer(selection.layer_names, chosen), selection.layer_names, config, adapter_name, notes)
    notes += record.schedule.notes() if record.schedule is not None else []
    by = selection.scores.by if selection.scores else None if record.schedule else selection.select.get("by")
    return LayerReport(tuple(_record_rows(record, changes)), by, selection.why, tuple(notes), selection.unit)


def rows(source: Any, adapter_name: str = "default") -> list[Row]:
    """The rows of a model, or those of a live record alone (without `change`, which needs the weights)."""
    if isinstance(source, nn.Module):
        return list(layer_report(source, adapter_name).rows)
    return _record_rows(source, {})


# ---- rows -----------------------------------------------------------------------------------------------------------


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    """The live config of one adapter, through DDP and compiled wrappers, of a PeftModel or a transformers model."""
    configs = getattr(model, "peft_config", None) or getattr(base_of(model), "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise ConfigError(f"{type(model).__name__} has no adapter to report on: wrap it with get_peft_model first")
    if adapter_name not in configs:
        raise ConfigError(unknown("adapter", adapter_name, configs))
    return configs[adapter_name]


def _wrapped(model: nn.Module, adapter_name: str) -> list[_Wrapped]:
    """Everything that carries weights of this adapter, in the order of the model."""
    found = []
    for path, module in base_of(model).named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not any(adapter_name in getattr(module, name, ()) for name in module.adapter_layer_names):
            continue
        parameter = getattr(module, "parameter_name", None)
        found.append(_Wrapped(f"{clean(path)}.{parameter}" if parameter else clean(path), module))
    return found


def _by_layer(layer_names: Sequence[str], wrapped: Sequence[_Wrapped]) -> dict[int, list[_Wrapped]]:
    """Targets by the layer whose name they start with; what lies outside every layer is left out."""
    groups: dict[int, list[_Wrapped]] = {}
    place = place_among(layer_names)
    for target in wrapped:
        index = place(target.name)
        if index is not None:
            groups.setdefault(index, []).append(target)
    return groups


def _record_rows(record: Any, changes: Mapping[int, float | None]) -> list[Row]:
    """Rows from what a live record holds; none while the choice is pending."""
    selection = record.selection
    if selection is None:
        return []
    # a layer's own number is all that depth measures: no score worth showing
    values = selection.scores.values if selection.scores and selection.scores.by != "depth" else ()
    chosen = set(selection.layers)
    if record.schedule is not None:
        chosen, values = record.schedule.ever(), record.schedule.scores()
    return [
        Row(
            layer=index,
            name=name,
            score=float(values[index]) if index < len(values) else None,
            chosen=index in chosen,
            steps=int(record.steps_trained.get(index, 0)),
            change=changes.get(index),
        )
        for index, name in enumerate(selection.layer_names)
    ]


def _plain_report(model: nn.Module, config: Any, adapter_name: str, wrapped: list[_Wrapped]) -> LayerReport:
    """The report of an adapter that nobody chose layers for: its layers are those that hold wrapped targets."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    why = f"adapter {adapter_name!r} records no choice of layers: plain {method}, every layer with a wrapped target"
    notes = []
    try:
        layer_names = tuple(layer.name for layer in layer_map(model).layers)
        groups = _by_layer(layer_names, wrapped)
        outside = len(wrapped) - sum(map(len, groups.values()))
        if outside:
            notes.append(f"{outside} wrapped modules lie outside the layers and are not listed")
    except LayerMapError:
        layer_names = tuple(target.name for target in wrapped)
        groups = {index: [target] for index, target in enumerate(wrapped)}
        notes.append("this model has no repeated layers: one row per wrapped module")
    changes = _changes(groups, layer_names, config, adapter_name, notes)
    rows = tuple(
        Row(index, name, None, index in groups, None, changes.get(index)) for index, name in enumerate(layer_names)
    )
    return LayerReport(rows, None, why, tuple(notes))


# ---- change of the weights ------------------------------------------------------------------------------------------


def _changes(
    groups: Mapping[int, Sequence[_Wrapped]],
    layer_names: Sequence[str],
    config: Any,
    adapter_name: str,
    notes: list[str],
) -> dict[int, float | None]:
    """‖ΔW‖_F / ‖W‖_F of each layer over its targets, one target at a time; None, with a note, where it is unknown."""
    changes: dict[int, float | None] = {}
    reasons: dict[str, list[str]] = {}
    for index in sorted(groups):
        changes[index] = None
        delta = weight = 0.0
        try:
            for target in groups[index]:
                parts = _squared_norms(target.layer, adapter_name, config)
                delta, weight = delta + parts[0], weight + parts[1]
        except _Unmeasured as reason:
            reasons.setdefault(str(reason), []).append(layer_names[index])
            continue
        if not math.isfinite(delta) or not math.isfinite(weight):
            reasons.setdefault("its weights hold NaN or infinity", []).append(layer_names[index])
        elif weight > 0.0:
            changes[index] = math.sqrt(delta / weight)
    notes += [f"change is unknown for {_three(names)}: {reason}" for reason, names in reasons.items()]
    return changes


@torch.no_grad()
def _squared_norms(layer: Any, adapter_name: str, config: Any) -> tuple[float, float]:
    """(‖ΔW‖², ‖W‖²) of one target. Besides the model a piece of it is held, a full weight where it is packed, merged, or its change
    is not a product of two factors."""
    variant: Any = getattr(layer, "lora_variant", {}).get(adapter_name)
    if hasattr(variant, "trained_change"):
        return variant.trained_change(layer, adapter_name)
    _check_measurable(layer, adapter_name, config)
    if hasattr(layer, "trained_change"):  # more than the running adapter: what was folded into the weights
        return layer.trained_change()
    dora = bool(getattr(config, "use_dora", False))
    merged = list(layer.merged_adapters)
    if any(name in getattr(layer, "lora_variant", ()) for name in merged):
        raise _Unmeasured("its adapter is merged into the base weights; unmerge first")
    weight = _base_weight(layer)
    if merged:  # the stored weight is W + ΔW; adapters add up, so take them out of a copy again
        weight = weight.float()
        for name in merged:
            weight = weight - layer.get_delta_weight(name).to(weight)
    if dora:
        return _squared_norms_dora(layer, adapter_name, weight)
    squared = _squared(weight)
    del weight  # a packed base was unpacked into it: let go before ΔW is formed
    if (factors := factors_of(layer, adapter_name)) is not None:
        return squared_product(factors.a, factors.b) * factors.scale**2, squared
    return _squared(layer.get_delta_weight(adapter_name)), squared


def _check_measurable(layer: Any, adapter_name: str, config: Any) -> None:
    """Raises: _Unmeasured where get_delta_weight would be something else than the change, or cannot be computed."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method not in _ADDITIVE:
        raise _Unmeasured(f"{method} does not add a matrix to the weight")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_REWRITES_BASE):
        raise _Unmeasured(f"init_lora_weights={start!r} moved part of the base weights into the adapter at the start")
    plain = start == "mica" or any(getattr(config, name, None) for name in _KNOWN_VARIANTS)
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    if variant is not None and not plain:
        raise _Unmeasured(f"the LoRA variant {type(variant).__name__} is not one matrix added to the weight")
    if any(t.is_meta or t.numel() == 0 or hasattr(t, "to_local") for t in layer.parameters()):
        raise _Unmeasured("its weights are offloaded or split over processes")


def _base_weight(layer: Any) -> torch.Tensor:
    """The weight under a tuner layer, unpacked when it is quantized. Raises: _Unmeasured when it has none."""
    if getattr(layer, "parameter_name", None):
        return layer.get_param()
    base = layer.get_base_layer()
    if hasattr(base, "in_proj_weight"):  # torch's MultiheadAttention; its out_proj is a target of its own
        return base.in_proj_weight
    if not hasattr(base, "weight") and not hasattr(base, "W_q"):
        raise _Unmeasured(f"{type(base).__name__} keeps its weight in a packed form that peft cannot unpack")
    return dequantized(base)


def _squared_norms_dora(layer: Any, adapter_name: str, weight: torch.Tensor) -> tuple[float, float]:
    """(‖ΔW‖², ‖W‖²) for W' = m·(W + sBA)/‖W + sBA‖, the norm per output (Liu et al. 2024), a few rows at a time."""
    factors = factors_of(layer, adapter_name)
    low_rank: Any = layer.get_delta_weight(adapter_name) if factors is None else None
    # Conv1D and embeddings are stored (in, out): put the outputs first, as a view
    if getattr(layer, "fan_in_fan_out", False) or adapter_name in getattr(layer, "lora_embedding_A", {}):
        weight, low_rank = weight.transpose(0, 1), None if low_rank is None else low_rank.transpose(0, 1)
    magnitude = layer.lora_magnitude_vector[adapter_name].weight.flatten().float()
    step = max(1, PIECE // max(1, weight[0].numel()))
    delta = total = 0.0
    for start in range(0, weight.shape[0], step):
        base = weight[start : start + step].flatten(1).to(magnitude)
        piece = factors.rows(start, start + step) if factors is not None else low_rank[start : start + step].flatten(1)
        moved = base + piece.to(magnitude)
        moved *= (magnitude[start : start + step] / torch.linalg.vector_norm(moved, dim=1)).unsqueeze(1)
        delta += float(torch.linalg.vector_norm(moved - base)) ** 2
        total += float(torch.linalg.vector_norm(base)) ** 2
    return delta, total


def _squared(tensor: torch.Tensor) -> float:
    """The sum of squares, in float32 pieces, so that no copy of the whole tensor in another dtype is made."""
    flat = tensor.reshape(-1)
    return sum(float(torch.linalg.vector_norm(piece.float())) ** 2 for piece in flat.split(PIECE))


# ---- table and picture ----------------------------------------------------------------------------------------------


def _table(rows: Sequence[Row], unit: str) -> list[str]:
    """The rows as aligned text with a header; '-' is unknown."""
    cells: list[tuple[str, ...]] = [columns(unit)]
    for row in rows:
        score = "-" if row.score is None else f"{row.score:.4g}"
        change = "-" if row.change is None else f"{100 * row.change:.3g}%"
        steps = "-" if row.steps is None else str(row.steps)
        cells.append((str(row.layer), row.name, score, "yes" if row.chosen else "no", steps, change))
    return grid(cells, "><><>")


def _three(names: Sequence[str]) -> str:
    return some(names, 3, " and {} more")
