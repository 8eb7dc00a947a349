"""What a `LayerQuantConfig` means on a model: the precision of every linear, before anything is changed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn

from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations import distributed
from layerpeft.model import precisions, rounding
from layerpeft.model.layers import LayerMap, Stacks, Target, base_of, find_module, stacks_of
from layerpeft.model.names import lying_in
from layerpeft.model.precisions import KEPT
from layerpeft.model.units import in_units
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.budget import (
    Bits,
    Unit,
    by_module,
    greedy,
    kl_table,
    losses,
    lowest_first,
    paired,
    pairings,
    total_loss,
    units_of,
)
from layerpeft.quantization.config import LayerQuantConfig
from layerpeft.quantization.targets import Able, able, split_groups
from layerpeft.selection.choose import candidates, choose_among
from layerpeft.selection.grammar import layer_numbers
from layerpeft.selection.scoring import needs, needs_batches, score
from layerpeft.selection.select import DEFAULT_BATCHES, Select
from layerpeft.text import note

DEFAULT_SCORER = "quantization_error"  # of what spends a budget without being told how: it needs no data
JUDGED = 9  # assignments that allocation: paired measures with objective: kl


def allot(
    config: LayerQuantConfig,
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    training: Collection[str] | None = None,
    *,
    known: bool = True,
    progress: bool = True,
    stacks: Stacks | None = None,
) -> Quantized:
    """The precision of every linear that may be quantized, without rows yet. In several processes the first one's is everybody's.

    `training`: names of the layers that will train, for `apply_to`; `known`: False for a model without weights, where scores
    are taken to be equal, and the lowest layers to be picked; `stacks`: what a walk over it has found.
    Raises: ConfigError, SelectionError, ScoreError, LayerMapError.
    """
    equal = not known and config.has_budget and not decided_early(config)
    if not known:
        config = _blind(config)
    stacks = stacks or stacks_of(model)
    layers = stacks.layers(config.choosing.stack)
    found = able(model, layers, config.skip_modules or (), config.extra_modules or (), stacks)
    inside = _scope(config, found, training)
    modules = {t.name: _untouched(config, model, t, inside) for t in found.targets}
    if config.has_budget:
        targets = _own(config, layers, found, inside)
        modules |= _spent(config, model, layers, targets, modules, batches, progress, equal)
    else:
        modules |= _picked(config, model, layers, found, inside, batches, progress)
    _refuse(config, found, modules)
    modules = distributed.from_first(modules)
    why = _why(config, modules, layers, found)
    return Quantized(modules, config.storage, left=found.left, why=why, choice=config.plain())


def by_training(
    model: nn.Module,
    frozen: str | None,
    trained: str | None,
    training: Collection[str],
    stack: str | None,
    stacks: Stacks,
) -> Quantized:
    """What `quantize_frozen` and `quantize_trained` mean: linears in layers that train (names in `training`), and all others.
    Raises: ConfigError where that leaves nothing to quantize."""
    found = able(model, stacks.layers(stack), stacks=stacks)
    trains = lying_in(training)
    kinds = {True: precisions.named(trained or 16), False: precisions.named(frozen or 16)}
    modules = {t.name: kinds[trains(t.name)] for t in found.targets}
    if not any(p != KEPT for p in modules.values()):
        raise ConfigError(_nothing(frozen, found, modules, training))
    counts = {side: sum(trains(t.name) is side for t in found.targets) for side in (False, True)}
    why = f"{kinds[False]} where nothing trains ({counts[False]} linears), {kinds[True]} where it does ({counts[True]})"
    choice = {k: v for k, v in (("quantize_frozen", frozen), ("quantize_trained", trained)) if v is not None}
    return Quantized(modules, left=found.left, why=why, choice=choice)


def _blind(config: LayerQuantConfig) -> LayerQuantConfig:
    """The same, with a choice that needs neither weights nor data."""
    twin, asked = copy.deepcopy(config), config.choosing
    plain = {k: getattr(asked, k) for k in ("layers", "exclude", "stack", "seed", "unit", "within")}
    if config.has_budget and not decided_early(config):
        twin._select = Select(by="random", keep=1, **plain)
        twin.select, twin.objective = {"by": "random"}, "scores"
    elif not config.has_budget and needs(asked) != "nothing":
        twin._select = Select(by="depth", keep=asked.keep, pick="bottom", **plain)
    return twin


def wants_batches(config: LayerQuantConfig) -> bool:
    """Whether precisions are chosen by what batches say."""
    scored = not config.has_budget or config.objective == "scores" or config.allocation == "paired"
    return (config.has_budget and config.objective == "kl") or (scored and needs_batches(_scoring(config)))


def decided_early(config: LayerQuantConfig) -> bool:
    """Whether the precisions can be known from the architecture alone, before a weight is loaded."""
    return needs(_scoring(config)) == "nothing" and not (config.has_budget and config.objective == "kl")


def _scoring(config: LayerQuantConfig) -> Select:
    """`select`, by the default scorer where a budget is spent and none is named."""
    named = isinstance(config.select, Select) or (isinstance(config.select, Mapping) and "by" in config.select)
    if not config.has_budget or config.choosing.by != "depth" or named:
        return config.choosing
    return replace(config.choosing, by=DEFAULT_SCORER, keep=1)


def _scope(config: LayerQuantConfig, found: Able, training: Collection[str] | None) -> set[str]:
    """Names of the linears that `apply_to` lets in."""
    if config.apply_to == "all":
        return set(found.names)
    if training is None:
        raise ConfigError(
            f"quant: apply_to={config.apply_to!r} is of a training config, which says which layers train: "
            "LayerLoraConfig(select=…, quant={…})"
        )
    trains = lying_in(training)
    return {n for n in found.names if trains(n) is (config.apply_to == "trained")}


def _untouched(config: LayerQuantConfig, model: nn.Module, target: Target, inside: Collection[str]) -> str:
    """The precision of a linear that is not picked."""
    there = precisions.precision_of(find_module(model, target.name))
    return config.others or there if target.name in inside else there


def _own(config: LayerQuantConfig, layers: LayerMap, found: Able, inside: set[str]) -> tuple[Target, ...]:
    """The linears of the stack that the choice is about. Raises: ConfigError when there is none."""
    targets = tuple(t for t in layers.targets if t.name in found.layers and t.name in inside)
    if not targets:
        reasons = "; ".join(f"{n}: {w}" for n, w in islice(found.left.items(), 4))
        raise ConfigError(
            f"quant: nothing can be quantized in the layers of {layers.stack!r} ({reasons or config.apply_to})"
        )
    return targets


def _picked(
    config: LayerQuantConfig,
    model: nn.Module,
    layers: LayerMap,
    found: Able,
    inside: set[str],
    batches: Iterable[Any] | None,
    progress: bool,
) -> dict[str, str]:
    layers, targets = in_units(layers, config.choosing.unit, _own(config, layers, found, inside))
    if config.listed is not None:
        by_layer = _listed(config.listed, len(layers))
        return {t.name: by_layer[t.layer] for t in targets if t.layer in by_layer}
    _need_batches(config, batches)
    selection = choose_among(model, config.choosing, layers, targets, batches, progress)
    chosen = dict.fromkeys(selection.targets, config.picked)
    extra = {t.name: config.picked for t in found.targets if t.role == "extra"}
    return chosen | extra


def _listed(listed: Mapping[Any, str], count: int) -> dict[int, str]:
    """The precisions of layers that are listed with them. Raises: SelectionError, ConfigError for a layer that has two."""
    found: dict[int, str] = {}
    problems = Problems("quant")
    for layers, precision in listed.items():
        for layer in layer_numbers(layers, count):
            if found.setdefault(layer, precision) != precision:
                problems.add(f"bits: layer {layer} is to be {found[layer]} and, by {layers!r}, {precision}")
    problems.raise_if_any(ConfigError)
    return found


def _spent(
    config: LayerQuantConfig,
    model: nn.Module,
    layers: LayerMap,
    targets: tuple[Target, ...],
    untouched: Mapping[str, str],
    batches: Iterable[Any] | None,
    progress: bool,
    equal: bool,
) -> dict[str, str]:
    """The precisions that the budget buys. `untouched`: what each linear has without it; `equal`: every weight counts as much."""
    select = _scoring(config)
    among = set(candidates(select, layers, targets))
    targets = tuple(t for t in targets if t.layer in among)
    _need_batches(config, batches)
    seen = list(islice(batches, select.num_batches or DEFAULT_BATCHES)) if batches is not None else None
    scored = not equal and (config.objective == "scores" or config.allocation == "paired")
    scores = score(model, select, layers, targets, seen) if scored else None
    units = units_of(config, model, layers, targets, scores)
    names = {m for u in units for m in u.modules}
    budget = _budget(config, model, units, {n: p for n, p in untouched.items() if n not in names})
    choices = config.may_use
    if config.allocation == "paired":
        return by_module(units, _paired(config, model, units, budget, seen, progress))
    if config.allocation == "lowest_first":
        lower, higher = choices
        return by_module(units, lowest_first(units, lower, higher, budget))
    kl = config.objective == "kl"
    table = kl_table(model, units, choices, seen or (), config.storage, progress) if kl else losses(units, choices)
    return by_module(units, greedy(units, choices, budget, table))


def _paired(
    config: LayerQuantConfig,
    model: nn.Module,
    units: list[Unit],
    budget: int,
    batches: list[Any] | None,
    progress: bool,
) -> Bits:
    """The best of the assignments that raise as many units as they lower; the first of equals."""
    base, lower, higher = _ladder(config, units, budget)
    if config.objective == "scores":
        predicted = losses(units, (lower, base, higher))
        best = paired(units, base, lower, higher, budget, lambda bits: total_loss(bits, predicted))
    else:
        found = pairings(units, base, lower, higher, budget, JUDGED)
        whole = [by_module(units, bits) for bits in found]
        measured = rounding.output_kl(model, batches or (), whole, config.storage, progress=progress)
        best = found[min(range(len(found)), key=lambda i: measured[i])]
    if set(best.values()) == {base}:
        note(
            f"allocation: paired ended without a pair, {base} everywhere: none that fits the budget is better ({lower} and "
            f"{higher} are what could be given); `choices` nearer to each other, or allocation: greedy, may do more"
        )
    return best


def _budget(config: LayerQuantConfig, model: nn.Module, units: list[Unit], others: Mapping[str, str]) -> int:
    """Bytes that the units may take. Raises: ConfigError where nothing is left of the budget."""
    if config.mean_bits is not None:
        return int(config.mean_bits * sum(u.weights for u in units) / 8)
    base = base_of(model)
    moving = {m for u in units for m in u.modules}
    rest = precisions.tensor_bytes(base) - sum(
        precisions.measured_bytes(find_module(base, n)) for n in (*moving, *others)
    )
    for name, kind in others.items():
        module: Any = find_module(base, name)
        if kind == KEPT or precisions.precision_of(module) != KEPT:
            rest += precisions.measured_bytes(module)
        else:
            rest += precisions.stored_bytes(
                kind, module.out_features, module.in_features, config.storage, module.weight.element_size()
            )
    total = config.budget_bytes or 0
    if total <= rest:
        raise ConfigError(
            f"quant: budget={config.budget!r} is {total:,} bytes, and what is not in the layers alone (embeddings, heads, norms, "
            f"linears that the budget is not for) takes {rest:,}"
        )
    return total - rest


def _ladder(config: LayerQuantConfig, units: list[Unit], budget: int) -> tuple[str, str, str]:
    """The base of a paired budget, and the precisions below and above it. Raises: ConfigError."""
    choices = [c for c in config.may_use if all(c in u.costs for u in units)]
    fitting = [c for c in choices if sum(u.costs[c] for u in units) <= budget]
    if not fitting or choices.index(fitting[-1]) in (0, len(choices) - 1):
        sizes = ", ".join(f"{c} {sum(u.costs[c] for u in units):,}" for c in choices)
        raise ConfigError(
            f"quant: allocation='paired' raises as many as it lowers around the precision that fits the budget of {budget:,} bytes "
            f"everywhere, and needs one below and one above it; bytes by choice: {sizes}"
        )
    at = choices.index(fitting[-1])
    return choices[at], choices[at - 1], choices[at + 1]


def _need_batches(config: LayerQuantConfig, batches: Iterable[Any] | None) -> None:
    if batches is None and wants_batches(config):
        what = "objective='kl'" if config.objective == "kl" else f"by: {_scoring(config).by}"
        raise ConfigError(
            f"quant: {what} is measured on data; pass batches=… (any iterable of model inputs with labels) with the config, "
            "or to get_peft_model or layerpeft.quantize"
        )


def _refuse(config: LayerQuantConfig, found: Able, modules: Mapping[str, str]) -> None:
    problems = Problems("quant")
    extra = [t.name for t in found.targets if t.role == "extra" and modules[t.name] == KEPT]
    if extra:
        problems.add(
            f"extra_modules: {', '.join(extra)} would stay in 16 bit; with a budget, or listed bits, their precision is `rest`"
        )
    if not config.split_fused:
        for sentence in split_groups(found.linears, modules)[:4]:
            problems.add(
                f"serving engines multiply these as one matrix and need equal bits: {sentence} (split_fused=True lets them differ)"
            )
    if not any(p != KEPT for p in modules.values()):
        fits = ": the budget lets all of them keep what they have" if config.has_budget else ""
        problems.add(f"nothing would be stored in fewer bits{fits}")
    problems.raise_if_any(ConfigError)


def _why(config: LayerQuantConfig, modules: Mapping[str, str], layers: LayerMap, found: Able) -> str:
    listed = ", ".join(f"{kind} {count}" for kind, count in Counter(modules.values()).most_common())
    if config.mean_bits is not None:
        return f"{config.allocation} over a budget of {config.mean_bits:g} stored bits per weight: linears in {listed}"
    if config.budget is not None:
        return f"{config.allocation} over a budget of {config.budget} for all weights: linears in {listed}"
    return f"linears in {listed}, of {len(layers)} layers in {layers.stack or 'the model'}"


def _nothing(frozen: str | None, found: Able, modules: Mapping[str, str], training: Collection[str]) -> str:
    if not modules:
        reasons = "; ".join(f"{n} is {w}" for n, w in islice(found.left.items(), 4))
        return f"quantize_frozen, quantize_trained: the model has no linear that can be quantized ({reasons})"
    if frozen is not None:
        return (
            f"quantize_frozen={frozen!r}: all {len(training)} layers train, so that no linear is left to quantize; choose fewer "
            f"layers, or quantize those that train, too (QLoRA): quantize_trained={frozen!r}"
        )
    return "quantize_trained: no layer with linears trains"
