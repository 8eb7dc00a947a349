"""Bits where they matter: at equal mean bits, perplexity on held-out text of shares by score, uniform and random ones."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

import layerpeft
from benchmarks import table
from benchmarks.case import Case
from benchmarks.model import Batch, Model, build, folder
from benchmarks.model import check as check_model
from layerpeft.errors import LayerpeftError, Problems, unknown
from layerpeft.model.evaluating import evaluating
from layerpeft.model.precisions import PRECISIONS, Storage, fits, named, stored_bytes
from layerpeft.model.rounding import output_kl, rounded_weights
from layerpeft.quantization.budget import (
    Bits,
    Losses,
    Unit,
    by_module,
    greedy,
    kl_table,
    losses,
    lowest_first,
    mean_bits,
    pairings,
)
from layerpeft.quantization.targets import fused_groups
from layerpeft.recipe import shipped
from layerpeft.selection import plugins
from layerpeft.selection.select import SCORERS, Select

Say = Callable[[str], None]
TEXTS = {"gsm8k": ("gsm8k_{}.jsonl", ("question", "answer")), "essays": ("revision_{}.jsonl", ("after",))}
PER = ("layer", "module")
ITEMSIZE = 2  # scales are counted as a 16-bit model has them
UNIFORM, RANDOM, SHUFFLED = "uniform", "random scores", "shuffled kl"


@dataclass(frozen=True)
class Rows:
    """Rows of `length` tokens from each of the two texts: to choose by (training files), and held out (evaluation files)."""

    length: int = 256
    calibration: int = 8
    held_out: int = 40
    batch: int = 4


@dataclass(frozen=True)
class Options:
    """`budgets`: mean stored bits, or a precision, whose bytes everywhere are the budget. `ways`: scorers with their options.

    `ladder`: lower, base and higher precision of the paired shares, at the budget of the base. Objective "kl" is always there.
    `lowered`: by label, one of the ways and two precisions: the layers of its lowest scores go to the lower one until the budget
    is met, to a four-hundredth of it.
    """

    model: Model
    ways: Mapping[str, Any]
    budgets: Sequence[Any]
    rows: Rows = Rows()
    choices: Sequence[Any] = (2, 3, 4, 8, 16)
    ladder: Sequence[str] = ("hqq2", "hqq3", "nf4")
    lowered: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    per: Sequence[str] = PER
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, Batch(1, 1), problems)
    if options.model.shipped is None:
        problems.add("model: bits needs a model that knows something (shipped)")
    for value in (*options.choices, *options.ladder):
        try:
            named(value)
        except ValueError as error:
            problems.add(str(error))
    for value in options.budgets:
        if value not in PRECISIONS and (isinstance(value, str) or not value > 0):
            problems.add(f"budgets: {value!r} is no number of bits above 0 and no precision ({', '.join(PRECISIONS)})")
    for value in options.per:
        if value not in PER:
            problems.add(f"per: {unknown('unit', value, PER)}")
    for label, way in options.ways.items():
        try:
            Select.parse({**way, "keep": 1})
        except (LayerpeftError, TypeError) as error:
            problems.add(f"ways.{label}: {error}")
    for label, given in options.lowered.items():
        way, *both = given
        if way not in options.ways:
            problems.add(f"lowered.{label}: {unknown('way', way, options.ways)}")
        if len(both) != 2 or any(b not in options.choices for b in both):
            problems.add(
                f"lowered.{label}: {both!r} are not two of the choices ({', '.join(map(str, options.choices))})"
            )
    if len(options.seeds) < 2:
        problems.add("seeds: at least 2, since chance is told by its spread")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Perplexities by unit, budget and way of sharing out."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    model = build(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder(options.model))
    calibration = [
        b for text in TEXTS for b in batches(tokenizer, text, "train", options.rows, options.rows.calibration)
    ]
    held_out = {text: batches(tokenizer, text, "eval", options.rows, options.rows.held_out) for text in TEXTS}
    scores = {label: _scores(model, way, calibration) for label, way in options.ways.items()}
    say("scored")
    found: dict[str, Any] = {}
    for per in options.per:
        units = units_of(model, per, options.choices)
        measured = kl_table(model, units, _names(options), calibration, Storage(), progress=False)
        say(f"per {per}: the divergence of {len(units)} units is measured")
        shares = _Shares(options, model, units, measured, scores, calibration)
        found[per] = {}
        for budget in options.budgets:
            rows = {label: _row(model, units, bits, held_out) for label, bits in shares.at(budget).items()}
            found[per][str(budget)] = {"rows": rows} | _against(rows)
            say(
                f"per {per}, {budget}: "
                + ", ".join(f"{k} {_together(r):.3f}" for k, r in rows.items() if "seed" not in k)
            )
    kept = _row(model, [], {}, held_out)
    return {
        "as_it_is": {k: kept[k] for k in ("loss", "perplexity")},
        "held_out_tokens": _tokens(held_out),
        "found": found,
    }


def units_of(model: nn.Module, per: str, choices: Sequence[Any]) -> list[Unit]:
    """Layers, or groups of linears that serving engines fuse, with their bytes."""
    found = []
    for layer in layerpeft.layer_map(model).layers:
        groups = [tuple(t.name for t in layer.targets)] if per == "layer" else fused_groups(layer.targets)
        for group in groups:
            held = [t for t in layer.targets if t.name in group]
            costs = {
                c: sum(stored_bytes(c, *t.shape, Storage(), ITEMSIZE) for t in held)
                for c in map(named, choices)
                if all(fits(c, *t.shape, Storage()) for t in held)
            }
            found.append(Unit("+".join(group), group, sum(t.params for t in held), costs=costs))
    return found


def batches(tokenizer: Any, text: str, split: str, rows: Rows, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` rows of a text that ships, put end to end and cut evenly, without padding."""
    pattern, keys = TEXTS[text]
    lines = Path(shipped.resolve(f"{shipped.SCHEME}{pattern.format(split)}")).read_text(encoding="utf-8").splitlines()
    ids: list[int] = []
    for line in lines:
        row = json.loads(line)
        ids += [*tokenizer(" ".join(row[k] for k in keys))["input_ids"], tokenizer.eos_token_id] if row[keys[0]] else []
        if len(ids) >= count * rows.length:
            break
    whole = torch.tensor(ids[: count * rows.length]).view(count, rows.length)
    return [{"input_ids": part, "labels": part} for part in whole.split(rows.batch)]


@dataclass(frozen=True)
class _Shares:
    """Everything that is the same for all budgets."""

    options: Options
    model: nn.Module
    units: Sequence[Unit]
    measured: Losses
    scores: Mapping[str, Any]
    calibration: Sequence[Mapping[str, Any]]

    def at(self, budget: Any) -> dict[str, Bits]:
        """The ways to share out a budget: by score, by divergence, uniform and at random."""
        weights = sum(u.weights for u in self.units)
        size = sum(u.costs[budget] for u in self.units) if budget in PRECISIONS else int(budget * weights / 8)
        choices = _names(self.options)
        found: dict[str, Bits] = {}
        if budget in PRECISIONS:
            found[UNIFORM] = {u.name: budget for u in self.units}
        for label, scores in self.scores.items():
            ready = scored(self.units, scores)
            if ready is not None:
                found[label] = greedy(ready, choices, size, losses(ready, choices))
        for label, (way, low, high) in self.options.lowered.items():
            values = self.scores[way].values
            if len(values) == len(self.units):
                ranked = [replace(u, score=v) for u, v in zip(self.units, values, strict=True)]
                # the codes that bitsandbytes keeps beside nf4, less than this, are not to cost a layer
                found[label] = lowest_first(ranked, named(low), named(high), size + size // 400)
        found["kl"] = greedy(self.units, choices, size, self.measured)
        if budget == self.options.ladder[1]:
            found |= self._paired(size)
        for seed in self.options.seeds:
            draw = random.Random(f"layerpeft bits {seed}")
            drawn = [replace(u, score=(1.0 - draw.random()) * u.weights) for u in self.units]
            found[f"{RANDOM}, seed {seed}"] = greedy(drawn, choices, size, losses(drawn, choices))
            found[f"{SHUFFLED}, seed {seed}"] = shuffled(self.units, found["kl"], draw)
        return found

    def _paired(self, size: int) -> dict[str, Bits]:
        """As many up as down, in the order of each score; judged by the divergence of the whole."""
        lower, base, higher = map(named, self.options.ladder)
        orders = {label: scored(self.units, s) for label, s in self.scores.items()}
        orders["kl"] = [replace(u, score=self.measured[u.name][base]) for u in self.units]
        found = {}
        for label, units in orders.items():
            if units is None:
                continue
            pairs = pairings(units, base, lower, higher, size)
            whole = [by_module(units, bits) for bits in pairs]
            values = output_kl(self.model, self.calibration[::2], whole, Storage(), progress=False)
            found[f"{label}, paired"] = pairs[min(range(len(pairs)), key=values.__getitem__)]
        return found


def scored(units: Sequence[Unit], scores: Any) -> list[Unit] | None:
    """The units with their scores; None where a scorer says nothing of parts of a layer."""
    of_whole = plugins.traits(SCORERS, scores.by).of_whole
    if len(units) == len(scores.values):
        return [replace(u, score=v * (1 if of_whole else u.weights)) for u, v in zip(units, scores.values, strict=True)]
    if not scores.targets:
        return None
    parts = {u.name: sum(scores.targets[m] for m in u.modules) for u in units}
    return [replace(u, score=parts[u.name] * (1 if of_whole else u.weights / len(u.modules))) for u in units]


def shuffled(units: Sequence[Unit], bits: Mapping[str, str], draw: random.Random) -> Bits:
    """The same precisions, dealt out anew among units of equal size: to the byte the same budget."""
    found: Bits = {}
    sizes: dict[tuple[Any, ...], list[str]] = {}
    for unit in units:
        sizes.setdefault(tuple(sorted(unit.costs.items())), []).append(unit.name)
    for names in sizes.values():
        found |= dict(zip(names, draw.sample([bits[n] for n in names], len(names)), strict=True))
    return found


def _scores(model: nn.Module, way: Mapping[str, Any], calibration: Sequence[Any]) -> Any:
    options = {k: v for k, v in way.items() if k != "by"}
    return layerpeft.score_layers(
        model, way["by"], batches=calibration, num_batches=len(calibration), target_modules="all-linear", progress=False,
        **options,
    )  # fmt: skip


def _names(options: Options) -> list[str]:
    return [named(c) for c in options.choices]


def _row(model: nn.Module, units: Sequence[Unit], bits: Bits, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """Mean stored bits, which precisions, and the loss and perplexity per token of each text."""
    with rounded_weights(model, by_module(units, bits), Storage()), evaluating(model):
        loss = {t: round(statistics.fmean(_losses(model, data)), 6) for t, data in held_out.items()}
    row: dict[str, Any] = {"loss": loss, "perplexity": {t: round(math.exp(v), 3) for t, v in loss.items()}}
    if units:
        kinds = [bits[u.name] for u in units]
        row["mean_bits"] = round(mean_bits(units, bits), 4)
        row["units"] = {c: kinds.count(c) for c in PRECISIONS if c in kinds}
        row["bits"] = " ".join(kinds)  # in the order of the model
    return row


def _losses(model: nn.Module, data: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
    """By row, so that a last batch of fewer rows weighs no more than its rows."""
    found: list[float] = []
    for batch in data:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        found += each.double().mean(1).tolist()
    return found


def _together(row: Mapping[str, Any]) -> float:
    return math.exp(statistics.fmean(row["loss"].values()))


def _against(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Chance in numbers, and of every way by how much of the loss it beats uniform shares and chance."""
    chance = {}
    for kind in (RANDOM, SHUFFLED):
        values = [
            statistics.fmean(r["loss"].values()) for label, r in rows.items() if label.startswith(f"{kind}, seed")
        ]
        chance[kind] = {
            "mean": round(statistics.fmean(values), 5),
            "deviation": round(statistics.stdev(values), 5),
            "losses": [round(v, 6) for v in values],
        }
    found = {}
    for label, row in rows.items():
        if ", seed" in label:
            continue
        loss = statistics.fmean(row["loss"].values())
        found[label] = {
            kind: {"gain": round(c["mean"] - loss, 5), "seeds_beaten": sum(loss < v for v in c["losses"])}
            for kind, c in chance.items()
        }
        if UNIFORM in rows and label != UNIFORM:
            found[label][UNIFORM] = {"gain": round(statistics.fmean(rows[UNIFORM]["loss"].values()) - loss, 5)}
    return {"chance": chance, "against": found}


def _tokens(held_out: Mapping[str, Any]) -> dict[str, int]:
    return {text: sum(b["input_ids"][:, 1:].numel() for b in data) for text, data in held_out.items()}


def tables(result: Mapping[str, Any]) -> str:
    """One table per unit and budget: stored bits, perplexity of both texts, and whether it beats uniform and random shares."""
    kept = ", ".join(f"{v:.2f} ({t})" for t, v in result["as_it_is"]["perplexity"].items())
    parts = [f"Perplexity as it is: {kept}."]
    for per, budgets in result["found"].items():
        for budget, found in budgets.items():
            what = f"the bytes of {budget} everywhere" if budget in PRECISIONS else f"{budget} bits a weight"
            parts.append(f"**Per {per}, {what}**")
            parts.append(_table(found, result))
    return "\n\n".join(parts)


def _table(found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    texts = list(result["as_it_is"]["perplexity"])
    head = ["shared out by", "stored bits", *texts, "both", "under uniform", "under random", "under shuffled", "units"]
    lines = []
    for label, row in found["rows"].items():
        if ", seed" in label:
            continue
        against = found["against"][label]
        uniform = _hundredths(against[UNIFORM]["gain"]) if UNIFORM in against else ""
        chances = [
            f"{_hundredths(against[k]['gain'])} ({against[k]['seeds_beaten']} of {_seeds(found)})"
            for k in (RANDOM, SHUFFLED)
        ]
        units = ", ".join(f"{n} {c}" for c, n in row["units"].items())
        lines.append([label, f"{row['mean_bits']:.3f}", *(f"{row['perplexity'][t]:.2f}" for t in texts), f"{_together(row):.2f}",
                      uniform, *chances, units])  # fmt: skip
    for kind in (RANDOM, SHUFFLED):
        rows = [r for label, r in found["rows"].items() if label.startswith(f"{kind}, seed")]
        cells = [_spread([r["perplexity"][t] for r in rows]) for t in texts] + [_spread([_together(r) for r in rows])]
        seeds = ", ".join(f"{_together(r):.1f}" for r in rows)
        bits = statistics.fmean(r["mean_bits"] for r in rows)
        lines.append([f"{kind}, {len(rows)} seeds", f"{bits:.3f}", *cells, "", "", "", f"both, by seed: {seeds}"])
    return table.markdown(head, lines)


def _seeds(found: Mapping[str, Any]) -> int:
    return len(found["chance"][RANDOM]["losses"])


def _hundredths(gain: float) -> str:
    return f"{round(100 * gain, 2) + 0.0:+.2f}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
