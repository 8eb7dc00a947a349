"""Ways to choose a set of layers at equal time: each set trains for as many steps as the same number of operations pays for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import layerpeft
from benchmarks import questions, table
from benchmarks.case import Case
from benchmarks.healing import scored, trained
from benchmarks.model import LINEARS, Batch, Model, build, num_layers
from benchmarks.questions import held_out, loss, rows
from layerpeft.errors import LayerpeftError, Problems
from layerpeft.planning.trace import trace
from layerpeft.selection.select import Select

Say = Callable[[str], None]
SCORED = 8  # batches that a data-driven choice sees


@dataclass(frozen=True)
class Options:
    """`sets`: what `select` says, by label. `steps`: of training all layers, whose operations each of them may take; `lr` rises
    over a tenth of its own steps and falls in a line to nothing. Batches, draws of layers and factors are new for each of `seeds`.
    """

    model: Model
    batch: Batch
    sets: Mapping[str, Any]
    lr: float
    r: int = 16
    steps: int = 80
    seeds: Sequence[int] = (0, 1, 2)
    held_out: int = 64
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    questions.check("sets", options.model, options.batch, problems)
    for label, select in options.sets.items():
        try:
            Select.parse(select)
        except LayerpeftError as error:
            problems.absorb(error, "sets", label)
    questions.check_counts(options, ("steps", "held_out", "r"), problems)


def measure(case: Case, say: Say) -> dict[str, Any]:
    """By label and seed: the layers, what a step of theirs takes, how many steps there were, and what was learned."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    train = rows(options.model, "train", options.batch.length)
    kept = held_out(options.model, options.batch.length, options.held_out)
    everything = f"0-{num_layers(build(options.model)) - 1}"
    whole = trace(_wrapped(options, everything, 0, train), options.batch.rows, options.batch.length).flops
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in options.sets}
    for seed in options.seeds:
        for label, select in options.sets.items():
            run = _run(options, select, seed, train, kept, whole)
            found[label].append(run)
            say(
                f"{label}, seed {seed}: {run['steps']} steps of {run['layers']}, the loss fell by {run['decrease']:.4f}"
            )
    return {"runs": found, "operations": whole}


def _wrapped(options: Options, select: Any, seed: int, train: Sequence[Any]) -> Any:
    batches = scored(train, options.batch.rows, SCORED, seed)
    if isinstance(select, Mapping):
        select = {"seed": seed, **select}
    config = layerpeft.LayerLoraConfig(
        select=select,
        r=options.r,
        lora_alpha=2 * options.r,
        target_modules=LINEARS,
        batches=batches,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return layerpeft.get_peft_model(build(options.model, seed=seed), config).train()


def _run(
    options: Options, select: Any, seed: int, train: Sequence[Any], kept: Sequence[Any], whole: int
) -> dict[str, Any]:
    """One set from the pre-trained weights on."""
    model = _wrapped(options, select, seed, train)
    layers = [row.layer for row in layerpeft.layer_report(model).rows if row.chosen]
    taken = trace(model, options.batch.rows, options.batch.length).flops
    steps = max(1, round(options.steps * whole / taken))
    before = loss(model, kept)
    trained(model, train, options.batch.rows, steps, options.lr, seed)
    after = loss(model, kept)
    return {
        "seed": seed,
        "layers": layers,
        "steps": steps,
        "step_operations": round(taken / whole, 4),
        "losses": [round(before, 5), round(after, 5)],
        "decrease": round(before - after, 5),
    }


def tables(result: Mapping[str, Any]) -> str:
    """One line per way to choose: its layers with the first seed, a step's operations, steps, the decrease by seed and its mean."""
    done: Mapping[str, Any] = result["runs"]
    seeds = [run["seed"] for run in next(iter(done.values()))]
    head = [
        "choice",
        f"layers, seed {seeds[0]}",
        "a step, all layers 1",
        "steps",
        *(f"seed {s}" for s in seeds),
        "mean decrease",
    ]
    lines = []
    for label, runs in done.items():
        first, mean = runs[0], statistics.mean(run["decrease"] for run in runs)
        shown = [
            f"`{label}`",
            ", ".join(map(str, first["layers"])),
            f"{first['step_operations']:.2f}",
            str(first["steps"]),
        ]
        lines.append([*shown, *(f"{run['decrease']:.4f}" for run in runs), f"{mean:.4f}"])
    start = next(iter(done.values()))[0]["losses"][0]
    said = ", ".join(f"`{label}` is `{select}`" for label, select in result["case"]["sets"].items())
    return f"{table.markdown(head, lines)}\n\nDecrease of the held-out loss, which is {start:.3f} before. {said}."


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
