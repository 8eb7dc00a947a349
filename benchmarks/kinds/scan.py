"""What a gradient-norm scan costs beside a LoRA pass over the same batches, and how near its estimate comes to exact norms."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

import layerpeft
from benchmarks import clock, count, table
from benchmarks.case import Case
from benchmarks.model import Batch, Model, batches, build
from benchmarks.model import check as check_model
from layerpeft.errors import Problems
from layerpeft.text import size_text

Say = Callable[[str], None]
REFERENCE = "LoRA"


@dataclass(frozen=True)
class Options:
    """`count` batches; the reference is forward and backward of a LoRA of rank `r` on all linears; errors over `seeds` seeds."""

    model: Model
    batch: Batch
    count: int = 8
    r: int = 8
    rounds: int = 7
    seeds: int = 20
    threads: int = 1
    seed: int = 0


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Times and counts of the probe and the exact mode, and the largest relative error of a layer.

    `gradient_share`: most numbers alive at once in gradients of weights or sketches of them, as a share of the weights.
    """
    options: Options = case.options
    torch.set_num_threads(options.threads)
    found = _passes(options)
    rows: dict[str, Any] = _rows(found)
    say("counted")
    times = clock.interleaved(found.functions, options.rounds, options.seed)
    for name, row in clock.ratios(times, REFERENCE).items():
        rows[name] |= {"time": row, "seconds": round(statistics.median(times[name]), 4)}
    return {"scan": rows, "errors": _errors(found.scan, options.seeds)}


def counts(options: Options) -> dict[str, dict[str, Any]]:
    """The counts alone, by pass over the batches."""
    return _rows(_passes(options))


@dataclass(frozen=True)
class _Passes:
    """What passes over the batches, and over which model."""

    base: Any
    wrapped: Any
    data: list[Any]
    scan: Callable[..., layerpeft.Scores]
    functions: Mapping[str, Callable[[], Any]]


def _passes(options: Options) -> _Passes:
    base: Any = build(options.model, seed=options.seed)
    data = batches(options.model, options.batch, base.config.vocab_size, count=options.count, seed=options.seed)
    wrapped = peft.get_peft_model(
        build(options.model, seed=options.seed), peft.LoraConfig(r=options.r, target_modules="all-linear")
    )

    def lora() -> None:
        for batch in data:
            wrapped(**batch).loss.backward()
            wrapped.zero_grad()

    def scan(**how: Any) -> layerpeft.Scores:
        return layerpeft.score_layers(base, batches=data, target_modules="all-linear", progress=False, **how)

    functions = {REFERENCE: lora, "probe": scan, "exact": lambda: scan(exact=True)}
    return _Passes(base, wrapped, data, scan, functions)


def _rows(found: _Passes) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {
        name: _counts(function, found.wrapped if name == REFERENCE else found.base)
        for name, function in found.functions.items()
    }
    for name in ("probe", "exact"):
        rows[name]["gradient_share"] = _gradient_share(found.base, found.data, exact=name == "exact")
    return rows


def _gradient_share(model: Any, data: list[Any], exact: bool) -> float:
    """Most numbers alive at once in gradients of weights, or sketches of them, over the numbers of the weights."""
    rows, length = data[0]["input_ids"].shape
    length -= 8  # so that no width of the model is a number of tokens
    short = [{name: tensor[:, :length] for name, tensor in batch.items()} for batch in data[:1]]
    known = list(model.parameters())
    with count.still(), count.WithoutTokens([*known, *model.buffers()], (length, length - 1, rows * length)) as watch:
        layerpeft.score_layers(model, batches=short, target_modules="all-linear", progress=False, exact=exact)
    return round(watch.peak / sum(p.numel() for p in known), 5)


def _counts(function: Callable[[], Any], model: torch.nn.Module) -> dict[str, int]:
    function()
    known = [*model.parameters(), *model.buffers()]
    live = count.counted(function, known)
    return {"flops": live.flops, "peak_bytes": live.peak, "weight_bytes": count.size(known)}


def _errors(scan: Callable[..., Any], seeds: int) -> dict[str, Any]:
    """Largest relative error of a layer's score, over several draws of the sketch."""
    exact = scan(exact=True).values
    found = [max(abs(a / b - 1) for a, b in zip(scan(seed=s).values, exact, strict=True)) for s in range(seeds)]
    return {"seeds": seeds, "median": round(statistics.median(found), 4), "max": round(max(found), 4)}


def tables(result: Mapping[str, Any]) -> str:
    """One line per way, and the errors in a sentence."""
    unit = result["scan"][REFERENCE]
    lines = [
        [name, f"{row['flops'] / unit['flops']:.3f}", size_text(row["peak_bytes"]), table.ratio_text(row["time"])]
        for name, row in result["scan"].items()
    ]
    errors = result["errors"]
    found = table.markdown(["pass over the batches", "operations", "peak live", "time"], lines)
    shares = {name: f"{100 * result['scan'][name]['gradient_share']:.2f} %" for name in ("probe", "exact")}
    return (
        f"{found}\n\nLargest relative error of a layer's score by the probe: {100 * errors['median']:.2f} % (median of "
        f"{errors['seeds']} seeds), {100 * errors['max']:.2f} % (worst). Most numbers alive at once in gradients of weights, or in "
        f"sketches of them: {shares['probe']} of the weights with the probe, {shares['exact']} in exact mode."
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
