"""Ways to take layers out of a model: the loss before and after as many steps that heal it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import questions, table
from benchmarks.case import Case
from benchmarks.healing import scored, trained, wrapped
from benchmarks.model import Batch, Model, build
from benchmarks.questions import held_out, loss, rows
from layerpeft.errors import LayerpeftError, Problems
from layerpeft.selection.drop import drop_layers, parse_drop

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`drops`: what `drop` says, by label; null drops nothing. Each heals for `steps`, with the same batches."""

    model: Model
    batch: Batch
    drops: Mapping[str, Any]
    lr: float
    r: int = 16
    steps: int = 40
    scored: int = 3
    seed: int = 0
    held_out: int = 64
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    questions.check("dropping", options.model, options.batch, problems)
    for label, drop in options.drops.items():
        try:
            if drop is not None:
                parse_drop(drop)
        except LayerpeftError as error:
            problems.absorb(error, "drops", label)
    questions.check_counts(options, ("steps", "scored", "held_out", "r"), problems)


def measure(case: Case, say: Say) -> dict[str, Any]:
    """By label: the layers that went, and the losses before anything, without them, and healed."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    train = rows(options.model, "train", options.batch.length)
    kept = held_out(options.model, options.batch.length, options.held_out)
    found: dict[str, Any] = {}
    for label, drop in options.drops.items():
        found[label] = _run(options, drop, train, kept)
        say(f"{label}: without {found[label]['gone'] or 'none'}, the loss is {found[label]['losses']}")
    return {"runs": found, "whole": round(loss(build(options.model).train(), kept), 5)}


def _run(options: Options, drop: Any, train: Sequence[Any], kept: Sequence[Any]) -> dict[str, Any]:
    model, gone = build(options.model), tuple[int, ...]()
    if drop is not None:
        model, chosen = drop_layers(model, drop, scored(train, options.batch.rows, options.scored))
        gone = chosen.layers
    model.config.use_cache = False  # type: ignore[union-attr]
    before = loss(model.train(), kept)
    healed = wrapped(model, options.r, options.seed)
    trained(healed, train, options.batch.rows, options.steps, options.lr, options.seed)
    return {"gone": list(gone), "losses": [round(before, 5), round(loss(healed, kept), 5)]}


def tables(result: Mapping[str, Any]) -> str:
    """One line per way: what went, the loss without it, and healed."""
    lines = [
        [f"`{label}`", ", ".join(map(str, run["gone"])) or "none", *(f"{value:.3f}" for value in run["losses"])]
        for label, run in result["runs"].items()
    ]
    said = ", ".join(f"`{label}` is `{drop}`" for label, drop in result["case"]["drops"].items() if drop is not None)
    head = ["way", "layers that go", "loss without them", "healed"]
    return f"{table.markdown(head, lines)}\n\nThe held-out loss of the whole model is {result['whole']:.3f}. {said}."


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
