"""What gets bits of its own: layers, or fused groups of linears, with what they cost in each precision and how much they matter."""

from __future__ import annotations

from typing import Any

from torch import nn

from layerpeft import allocate, precisions, registry
from layerpeft.errors import ConfigError
from layerpeft.layers import LayerMap, Target, find_module
from layerpeft.quant_config import LayerQuantConfig
from layerpeft.quant_targets import fused_groups
from layerpeft.scores import Scores
from layerpeft.selection import SCORERS

# of the codes that bitsandbytes keeps with every 4-bit matrix; not counted in bits per weight, so that 4.5 buys nf4 everywhere
TABLE_BYTES = {False: 4 * 16, True: 4 * (16 + 256 + 1)}


def units_of(
    config: LayerQuantConfig, model: nn.Module, layers: LayerMap, targets: tuple[Target, ...], scores: Scores | None
) -> list[allocate.Unit]:
    """What gets bits of its own, with what it costs in each precision and how much it matters."""
    groups: list[tuple[str, ...]]
    if config.per == "module":
        groups = [(t.name,) for t in targets] if config.split_fused else fused_groups(targets)
    else:
        by_layer: dict[int, list[str]] = {}
        for t in targets:
            by_layer.setdefault(t.layer, []).append(t.name)
        groups = [tuple(g) for g in by_layer.values()]
    known = {t.name: t for t in targets}
    found = []
    for group in groups:
        costs = {
            c: cost for c in config.may_use if (cost := _cost(config, model, [known[n] for n in group], c)) is not None
        }
        weights = sum(known[n].params for n in group)
        score = _score(config, scores, [known[n] for n in group], weights) if scores is not None else 0.0
        name = layers.layers[known[group[0]].layer].name if config.per == "layer" else "+".join(group)
        found.append(allocate.Unit(name, group, weights, score, costs))
    return found


def _cost(config: LayerQuantConfig, model: nn.Module, targets: list[Target], choice: str) -> int | None:
    """Bytes of all of them together; None where one of them cannot be stored so."""
    total = 0
    for target in targets:
        out, inner = target.shape[-2:]
        device = next(find_module(model, target.name).parameters()).device
        if not precisions.fits(choice, out, inner, config.storage) or not precisions.reads(choice, inner, device):
            return None
        total += precisions.stored_bytes(choice, out, inner, config.storage, _itemsize(model, target))
    tables = TABLE_BYTES[config.double_quant] if choice in ("nf4", "fp4") and config.mean_bits is not None else 0
    return total - tables * len(targets)


def _itemsize(model: nn.Module, target: Target) -> int:
    weight: Any = find_module(model, target.name).weight
    return weight.element_size() if weight.is_floating_point() else 2


def _score(config: LayerQuantConfig, scores: Scores, targets: list[Target], weights: int) -> float:
    """How much the group matters as a whole. Raises: ConfigError for scores that do not say."""
    if scores.options.get("relative"):
        raise ConfigError(
            "quant: relative: true makes errors shares of their weights, and a budget needs the errors themselves; leave it out"
        )
    whole = (
        getattr(registry.get(SCORERS, scores.by), "OF_WHOLE", False) if scores.by in registry.names(SCORERS) else False
    )
    if config.per == "layer":
        value = scores.values[targets[0].layer]
        return value if whole else value * weights
    missing = [t.name for t in targets if t.name not in scores.targets]
    if missing:
        raise ConfigError(
            f"quant: per='module' needs a score for every module, and {scores.by} gives none for {missing[0]}; write per: layer, "
            "or choose by quantization_error, outliers or gradient_norm"
        )
    return sum(scores.targets[t.name] * (1 if whole else t.params) for t in targets)
