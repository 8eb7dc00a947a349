"""Spending a budget of bytes over units (layers, or fused groups of linears): pure functions, no model in sight.

`greedy` takes the step with the largest fall of the loss per byte again and again; `paired` moves as many units up as down
(SliM-LLM, arXiv 2405.14917, which does it for groups inside of one matrix); `lowest_first` lowers one unit after another by score
(LUQ, arXiv 2509.23729). Losses are predicted from scores, or measured.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from layerpeft.errors import ConfigError, Problems, ScoreError, nearest
from layerpeft.model import precisions
from layerpeft.model.layers import LayerMap, Target, find_module
from layerpeft.model.precisions import KEPT, PRECISIONS, Storage
from layerpeft.model.rounding import NUDGED, output_kl
from layerpeft.quantization.config import LayerQuantConfig
from layerpeft.quantization.targets import fused_groups
from layerpeft.selection import plugins
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import SCORERS
from layerpeft.text import some

Losses = Mapping[str, Mapping[str, float]]  # unit name -> precision -> loss
Bits = dict[str, str]  # unit name -> precision


@dataclass(frozen=True)
class Unit:
    """What gets one precision: `modules` (full names) with `weights` numbers, and the bytes of all of them by precision.

    `costs` holds the precisions that the unit can be stored in. `score` is of the whole unit, higher means "more harm if rounded":
    a share or a mean has to be multiplied by `weights` first, or small units win every comparison per byte.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    score: float = 0.0
    costs: Mapping[str, int] = field(default_factory=dict)


def losses(units: Sequence[Unit], choices: Sequence[str]) -> dict[str, dict[str, float]]:
    """The predicted loss of every unit in every precision: `score · 4^-bits`, as each bit quarters the squared error; 0 where kept.

    Raises: ScoreError for scores that cannot be shared out by.
    """
    check_scores(units)
    shrink = {c: 0.0 if c == KEPT else 4.0 ** -PRECISIONS[c].bits for c in choices}
    return {u.name: {c: u.score * shrink[c] for c in _allowed(u, choices)} for u in units}


def check_scores(units: Sequence[Unit]) -> None:
    """Raises: ScoreError where a score is below 0 or not finite, or all are 0."""
    problems = Problems("bits cannot be shared out by these scores")
    bad = [f"{u.name} ({u.score:g})" for u in units if not (math.isfinite(u.score) and u.score >= 0)]
    if bad:
        problems.add(f"they have to be numbers from 0, which {len(bad)} of {len(units)} are not: {some(bad)}")
    elif not any(u.score for u in units):
        problems.add("all of them are 0, so that no unit comes before another")
    problems.raise_if_any(ScoreError)


def greedy(units: Sequence[Unit], choices: Sequence[str], budget_bytes: int, losses: Losses) -> Bits:
    """The precision of every unit: all at the cheapest, then the step with the largest fall of the loss per byte that still fits.

    A step may skip precisions, so the steps run along the lower convex hull of each unit's (bytes, loss), and the result is
    the best one there is for the bytes it takes as long as every step has fitted (it minimises loss + λ · bytes). From the first
    step that does not fit on, smaller ones fill up what is left; the loss is then above the best possible by less than that
    step's own fall. A larger budget never gives a larger loss. Ties go to the unit that stands first.
    Raises: ConfigError where the cheapest choice takes more than the budget, or a unit fits none.
    """
    _check_units(units, choices)
    _check_losses(units, choices, losses)
    now = {u.name: min(_allowed(u, choices), key=lambda c: (u.costs[c], losses[u.name][c])) for u in units}
    left = budget_bytes - _affordable(units, now, budget_bytes)
    heap = [s for i, u in enumerate(units) if (s := _best_step(i, u, now[u.name], choices, left, losses)) is not None]
    heapq.heapify(heap)
    while heap:
        _, index, _, choice = heapq.heappop(heap)
        unit = units[index]
        cost = unit.costs[choice] - unit.costs[now[unit.name]]
        if cost <= left:  # otherwise the unit's best step was found when more was left
            now[unit.name] = choice
            left -= cost
        step = _best_step(index, unit, now[unit.name], choices, left, losses)
        if step is not None:
            heapq.heappush(heap, step)
    return now


def paired(
    units: Sequence[Unit],
    base: str,
    lower: str,
    higher: str,
    budget_bytes: int,
    judge: Callable[[Bits], float],
    tries: int | None = None,
) -> Bits:
    """Of the `pairings`, the one for which `judge` gives the least loss; the fewest pairs of equals. Raises: as `pairings`."""
    return min(pairings(units, base, lower, higher, budget_bytes, tries), key=judge)


def pairings(
    units: Sequence[Unit], base: str, lower: str, higher: str, budget_bytes: int, tries: int | None = None
) -> list[Bits]:
    """The i units of the lowest scores in `lower`, the i of the highest in `higher`, the rest in `base`; i from 0 to half of them.

    Those over the budget are left out. `tries`: at most so many, spread evenly over what fits (None: all).
    Raises: ConfigError where no i fits the budget, or a unit cannot be stored so; ScoreError for scores that give no order.
    """
    check_scores(units)
    _check_ladder(units, (lower, base, higher), "allocation: paired")
    ranked = sorted(range(len(units)), key=lambda i: (units[i].score, i))
    found: list[Bits] = []
    for count in range(len(units) // 2 + 1):
        bits = {u.name: base for u in units}
        bits |= {units[i].name: lower for i in ranked[:count]}
        bits |= {units[i].name: higher for i in ranked[len(units) - count :]}
        found.append(bits)
    _affordable(units, min(found, key=lambda bits: total_bytes(units, bits)), budget_bytes)
    return _spread([bits for bits in found if total_bytes(units, bits) <= budget_bytes], tries)


def lowest_first(units: Sequence[Unit], lower: str, higher: str, budget_bytes: int) -> Bits:
    """All in `higher`; then the units of the lowest scores go to `lower`, one after another, until the budget is met.

    Nothing but the order of the scores counts. Ties go to the unit that stands first.
    Raises: ConfigError where the budget is not met with all of them in `lower`, or a unit cannot be stored so; ScoreError for a
    score that is not finite.
    """
    if bad := [u.name for u in units if not math.isfinite(u.score)]:
        raise ScoreError(f"scores that are not finite give no order: {some(bad)}")
    _check_ladder(units, (lower, higher), "allocation: lowest_first")
    _affordable(units, {u.name: lower for u in units}, budget_bytes)
    bits, taken = {u.name: higher for u in units}, sum(u.costs[higher] for u in units)
    for unit in sorted(units, key=lambda u: u.score):
        if taken <= budget_bytes:
            break
        bits[unit.name] = lower
        taken -= unit.costs[higher] - unit.costs[lower]
    return bits


def total_bytes(units: Iterable[Unit], bits: Mapping[str, str]) -> int:
    """Bytes of all units in these precisions."""
    return sum(u.costs[bits[u.name]] for u in units)


def total_loss(bits: Mapping[str, str], losses: Losses) -> float:
    """The sum of the units' losses, as if none knew of the others."""
    return math.fsum(losses[name][choice] for name, choice in bits.items())


def mean_bits(units: Sequence[Unit], bits: Mapping[str, str]) -> float:
    """Stored bits per weight, scales included."""
    return 8 * total_bytes(units, bits) / sum(u.weights for u in units)


def by_module(units: Iterable[Unit], bits: Mapping[str, str]) -> dict[str, str]:
    """The precision of every module, by its full name."""
    return {module: bits[u.name] for u in units for module in u.modules}


def _best_step(
    index: int, unit: Unit, now: str, choices: Sequence[str], left: int, losses: Losses
) -> tuple[float, int, int, str] | None:
    """(-fall per byte, index, bytes, choice) of the unit's steepest step that fits; the shorter one of equals."""
    here, own = unit.costs[now], losses[unit.name]
    steps = [
        (-(own[now] - own[c]) / (unit.costs[c] - here), index, unit.costs[c] - here, c)
        for c in _allowed(unit, choices)
        if 0 < unit.costs[c] - here <= left and own[c] < own[now]
    ]
    return min(steps, default=None)


def _allowed(unit: Unit, choices: Sequence[str]) -> list[str]:
    return [c for c in choices if c in unit.costs]


def _spread(found: Sequence[Bits], tries: int | None) -> list[Bits]:
    """At most `tries` of them, evenly spread, the first and the last among them."""
    if tries is None or tries >= len(found):
        return list(found)
    last = len(found) - 1
    return [found[round(i * last / max(1, tries - 1))] for i in range(tries)]


def _affordable(units: Sequence[Unit], bits: Bits, budget: int) -> int:
    needed = total_bytes(units, bits)
    if needed > budget:
        rate, asked = mean_bits(units, bits), 8 * budget / sum(u.weights for u in units)
        raise ConfigError(
            f"the budget of {budget:,} bytes ({asked:.2f} bits a weight) is too small: the cheapest choice for these "
            f"{len(units)} units takes {needed:,} bytes ({rate:.2f} bits a weight, scales included). Raise it, or allow fewer bits."
        )
    return needed


def _check_units(units: Sequence[Unit], choices: Sequence[str]) -> None:
    problems = Problems("sharing out bits")
    if not units:
        problems.add("there is nothing to share them out over")
    counts = Counter(u.name for u in units)
    for name in (n for n, c in counts.items() if c > 1):
        problems.add(f"two units have the name {name}")
    for unit in units:
        if not _allowed(unit, choices):
            able = ", ".join(unit.costs) or "none"
            problems.add(f"{unit.name} can be stored in none of {', '.join(choices)} (in {able} it can)")
    problems.raise_if_any(ConfigError)


def _check_losses(units: Sequence[Unit], choices: Sequence[str], losses: Losses) -> None:
    problems = Problems("the losses to share out bits by")
    for unit in units:
        own = losses.get(unit.name)
        if own is None:
            close = nearest(unit.name, losses)
            problems.add(f"none are given for {unit.name}" + (f" (there are some for {close})" if close else ""))
            continue
        bad = [c for c in _allowed(unit, choices) if not math.isfinite(own.get(c, math.nan))]
        if bad:
            problems.add(f"{unit.name} has no finite one in {', '.join(bad)}")
    problems.raise_if_any(ScoreError)


def _check_ladder(units: Sequence[Unit], ladder: Sequence[str], name: str) -> None:
    """Raises: ConfigError where a unit cannot be stored in one of them, or does not take more bytes with each step."""
    _check_units(units, ladder)
    problems = Problems(name)
    for unit in units:
        missing = [c for c in ladder if c not in unit.costs]
        if missing:
            problems.add(f"{unit.name} cannot be stored in {', '.join(missing)}")
        elif not all(unit.costs[low] < unit.costs[high] for low, high in pairwise(ladder)):
            sizes = ", ".join(f"{c} {unit.costs[c]:,}" for c in ladder)
            problems.add(f"each step up has to take more bytes, which for {unit.name} is not so: {sizes}")
            break
    problems.raise_if_any(ConfigError)


def kl_table(
    model: nn.Module,
    units: Sequence[Unit],
    choices: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    storage: Storage,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """The measured loss of every unit in every precision it can be stored in: the output KL with this unit alone rounded.

    In a 16-bit model whatever changes makes all later roundings fall otherwise, which alone is some 1e-4 nats and has nothing to
    do with the precision. So each unit is also run with its weights moved by their last bit, and that is taken off.
    Raises: as `output_kl`.
    """
    pairs = [(u, c) for u in units for c in choices if c in u.costs and c != KEPT]
    noisy = [u for u in units if any(find_module(model, m).weight.element_size() == 2 for m in u.modules)]  # type: ignore[operator]
    asked = pairs + [(u, NUDGED) for u in noisy]
    assignments = [dict.fromkeys(u.modules, c) for u, c in asked]
    measured = output_kl(model, batches, assignments, storage, progress, "output KL by unit")
    floors = {u.name: value for u, value in zip(noisy, measured[len(pairs) :], strict=True)}
    table = {u.name: {c: 0.0 for c in choices if c in u.costs} for u in units}
    for (unit, choice), value in zip(pairs, measured, strict=False):
        table[unit.name][choice] = max(0.0, value - floors.get(unit.name, 0.0))
    return table


# ---- what gets bits of its own: layers, or fused groups of linears, with what they cost and how much they matter

# of the codes that bitsandbytes keeps with every 4-bit matrix; not counted in bits per weight, so that 4.5 buys nf4 everywhere
TABLE_BYTES = {False: 4 * 16, True: 4 * (16 + 256 + 1)}


def units_of(
    config: LayerQuantConfig, model: nn.Module, layers: LayerMap, targets: tuple[Target, ...], scores: Scores | None
) -> list[Unit]:
    """What gets bits of its own, with what it costs in each precision and how much it matters; without scores by its size alone."""
    if config.per == "module":
        groups = [(t.name,) for t in targets] if config.split_fused else fused_groups(targets)
    else:
        groups = [tuple(t.name for t in targets if t.layer == i) for i in dict.fromkeys(t.layer for t in targets)]
    known = {t.name: t for t in targets}
    found = []
    for group in groups:
        own = [known[n] for n in group]
        costs = {c: cost for c in config.may_use if (cost := _cost(config, model, own, c)) is not None}
        weights = sum(t.params for t in own)
        score = _score(config, scores, own, weights) if scores is not None else float(weights)
        name = layers.layers[own[0].layer].name if config.per == "layer" else "+".join(group)
        found.append(Unit(name, group, weights, score, costs))
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
    """How much the group matters as a whole; where the scores' order alone counts, a share or a mean stays one.
    Raises: ConfigError for scores that do not say."""
    if scores.options.get("relative"):
        raise ConfigError(
            "quant: relative: true makes errors shares of their weights, and a budget needs the errors themselves; leave it out"
        )
    whole = scores.by in plugins.names(SCORERS) and plugins.traits(SCORERS, scores.by).of_whole
    size = 1 if whole or config.allocation != "lowest_first" else weights
    if config.per == "layer":
        value = scores.values[targets[0].layer]
        return value if whole else value * weights / size
    missing = [t.name for t in targets if t.name not in scores.targets]
    if missing:
        raise ConfigError(
            f"quant: per='module' needs a score for every module, and {scores.by} gives none for {missing[0]}; write per: layer, "
            "or choose by quantization_error, outliers or gradient_norm"
        )
    return sum(scores.targets[t.name] * (1 if whole else t.params) for t in targets) / size
