"""Several depths trained at once (SoFT), against the last one alone, and against models that are truncated first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import questions, table
from benchmarks.case import Case
from benchmarks.healing import trained, wrapped
from benchmarks.model import Batch, Model, build, num_layers
from benchmarks.questions import held_out, loss, rows
from layerpeft.errors import LayerpeftError, Problems
from layerpeft.model.layers import layer_map
from layerpeft.model.shorten import shortened
from layerpeft.training.exits import at_exit, checked_exits, with_exits

Say = Callable[[str], None]
ARMS = {
    "all exits": "one run, the mean loss of all exits",
    "the last alone": "one run, the loss of the last exit; the others read from it",
    "truncated first": "a run for each exit, of the model that ends there",
}


@dataclass(frozen=True)
class Options:
    """`exits`: numbers or shares of layers. Every run takes `steps`; batches and factors are new for each of `seeds`."""

    model: Model
    batch: Batch
    exits: Sequence[int | str]
    lr: float
    r: int = 16
    steps: int = 60
    seeds: Sequence[int] = (0, 1)
    held_out: int = 64
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    questions.check("exits", options.model, options.batch, problems)
    if options.model.shipped is not None and not problems.items:
        try:
            checked_exits(options.exits, num_layers(build(options.model)))
        except LayerpeftError as error:
            problems.absorb(error)
    questions.check_counts(options, ("steps", "held_out", "r"), problems)


def measure(case: Case, say: Say) -> dict[str, Any]:
    """By arm and seed the loss at each exit, and that before training."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    train = rows(options.model, "train", options.batch.length)
    kept = held_out(options.model, options.batch.length, options.held_out)
    depths = checked_exits(options.exits, num_layers(build(options.model)))
    found: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            found[arm].append(_run(options, depths, arm, seed, train, kept))
            say(f"{arm}, seed {seed}: {found[arm][-1]}")
    return {"runs": found, "exits": list(depths), "before": _read(build(options.model), depths, kept)}


def _run(
    options: Options, depths: Sequence[int], arm: str, seed: int, train: Sequence[Any], kept: Sequence[Any]
) -> list[float]:
    def run(depth: int, exits: Sequence[int]) -> list[float]:
        whole: Any = build(options.model)
        model: Any = shortened(whole, layer_map(whole), range(depth))
        model.config.use_cache = False
        model = wrapped(model.train(), options.r, seed)
        if arm == "all exits":
            with_exits(model, exits)
        trained(model, train, options.batch.rows, options.steps, options.lr, seed)
        return _read(model, exits, kept)

    if arm == "truncated first":
        return [run(depth, [depth])[0] for depth in depths]
    return run(depths[-1], depths)


def _read(model: Any, exits: Sequence[int], kept: Sequence[Any]) -> list[float]:
    found = []
    for depth in exits:
        with at_exit(model, depth):
            found.append(round(loss(model, kept), 5))
    return found


def tables(result: Mapping[str, Any]) -> str:
    """One line per arm: the mean loss over seeds at each exit."""
    exits = result["exits"]
    lines = [["before training", *(f"{value:.3f}" for value in result["before"])]]
    for arm, runs in result["runs"].items():
        lines.append([arm, *(f"{statistics.mean(values):.3f}" for values in zip(*runs, strict=True))])
    said = "; ".join(f"{arm}: {what}" for arm, what in ARMS.items())
    return f"{table.markdown(['', *(f'{depth} layers' for depth in exits)], lines)}\n\nHeld-out loss, mean over seeds. {said}."


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
