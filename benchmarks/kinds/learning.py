"""How far arms come: the decrease of the held-out loss on GSM8K rows, with the same rows in the same order, over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import chart, count, questions, table
from benchmarks.arm import Arm, Unavailable, read_arms
from benchmarks.case import Case
from benchmarks.model import Batch, Model, build
from benchmarks.questions import Example, collated, held_out, loss, rows
from layerpeft.errors import Problems, unknown

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`steps` optimizer steps on `batch.rows` rows, cut at `batch.length` tokens, drawn anew from each of `seeds`.

    `lr` rises over `warm_up` steps and falls in a line to nothing; `held_out` rows are evaluated at the start and every
    `look_every` steps. `against`: the arms whose decrease is the unit of a column.
    """

    model: Model
    batch: Batch
    arms: Mapping[str, Any]
    against: Sequence[str]
    lr: float
    steps: int = 300
    warm_up: int = 20
    seeds: Sequence[int] = (0, 1, 2)
    held_out: int = 64
    look_every: int = 50
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    questions.check("learning", options.model, options.batch, problems)
    read_arms(options.arms, problems)
    for label in options.against:
        if label not in options.arms:
            problems.add(f"against: {unknown('label', label, options.arms)}")
    for name in ("steps", "held_out", "look_every"):
        if getattr(options, name) < 1:
            problems.add(f"{name}: {getattr(options, name)} is not at least 1")
    if not options.seeds:
        problems.add("seeds: none given")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """The arms' rows: losses by seed, decreases, their mean, and its ratio to those of other arms."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    train = rows(options.model, "train", options.batch.length)
    kept = held_out(options.model, options.batch.length, options.held_out)
    arms = read_arms(options.arms, Problems(case.name))
    found: dict[str, dict[str, Any]] = {arm.label: {"runs": []} for arm in arms}
    for seed in options.seeds:
        for arm in arms:
            try:
                run = _run(arm, options, seed, train, kept)
            except Unavailable as error:
                found[arm.label] = {"skipped": str(error)}
                continue
            found[arm.label]["runs"].append(run)
            say(f"{arm.label}, seed {seed}: the loss fell by {run['decrease']:.4f}")
    return {"arms": {arm.label: arm.to_dict() | _summary(arm.label, found, options.against) for arm in arms}}


def _run(arm: Arm, options: Options, seed: int, train: list[Example], kept: list[Any]) -> dict[str, Any]:
    """One arm from the pre-trained weights on."""
    torch.manual_seed(seed)
    if any(field.name == "seed" for field in fields(arm.options)):
        arm = replace(arm, options=replace(arm.options, seed=seed))
    ready = arm.build(build(options.model, seed=seed))
    ready.model.train()
    draw, losses = torch.Generator().manual_seed(seed), [loss(ready.model, kept)]
    for number in range(options.steps):
        rate = options.lr * min(1.0, (number + 1) / options.warm_up) * (1 - number / options.steps)
        for group in ready.optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(0, len(train), (options.batch.rows,), generator=draw).tolist()
        count.step(ready, collated([train[i] for i in chosen]), number)
        if (number + 1) % options.look_every == 0 or number + 1 == options.steps:
            losses.append(loss(ready.model, kept))
    looked = [0, *range(options.look_every, options.steps, options.look_every), options.steps]
    decrease = round(losses[0] - losses[-1], 5)
    return {"seed": seed, "steps": looked, "losses": [round(loss, 5) for loss in losses], "decrease": decrease}


def _summary(label: str, found: Mapping[str, Any], against: Sequence[str]) -> dict[str, Any]:
    if "skipped" in found[label]:
        return found[label]
    mean = {name: statistics.mean(r["decrease"] for r in row["runs"]) for name, row in found.items() if "runs" in row}
    over = {other: round(mean[label] / mean[other], 4) for other in against if other in mean}
    return found[label] | {"mean_decrease": round(mean[label], 5), "over": over}


def tables(result: Mapping[str, Any]) -> str:
    """One line per arm: the decrease by seed, its mean, and the mean over that of other arms."""
    done = {label: row for label, row in result["arms"].items() if "runs" in row}
    seeds = [run["seed"] for run in next(iter(done.values()))["runs"]]
    others = [label for label in result["case"]["against"] if label in done]
    head = ["arm", *(f"seed {seed}" for seed in seeds), "mean decrease", *(f"over `{other}`" for other in others)]
    lines = []
    for label, row in result["arms"].items():
        if "skipped" in row:
            lines.append([f"`{label}`", row["skipped"], *[""] * (len(head) - 2)])
            continue
        line = [f"`{label}`", *(f"{run['decrease']:.4f}" for run in row["runs"]), f"{row['mean_decrease']:.4f}"]
        lines.append(line + [f"{row['over'][other]:.4f}" for other in others])
    start = next(iter(done.values()))["runs"][0]["losses"][0]
    return f"{table.markdown(head, lines)}\n\nDecrease of the held-out loss, which is {start:.3f} before."


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """The held-out loss over the steps, the mean of the seeds, a line per arm."""
    curves = {}
    for label, row in result["arms"].items():
        if "runs" in row:
            means = [statistics.mean(at) for at in zip(*(run["losses"] for run in row["runs"]), strict=True)]
            curves[label] = (row["runs"][0]["steps"], means)
    return chart.curves(curves, ("optimizer steps", "held-out loss"), result["title"], path)
