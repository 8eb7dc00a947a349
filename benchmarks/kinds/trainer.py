"""TRL's own `SFTTrainer` with its default arguments: its steps counted and timed from inside, by a callback."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from benchmarks import chart, clock, table
from benchmarks.arm import ARMS, Arm, read_arms
from benchmarks.case import Case
from benchmarks.count import tensors_in, watching
from benchmarks.model import Batch, Model, batches, build, folder, num_layers
from benchmarks.model import check as check_model
from layerpeft.errors import Problems, unknown
from layerpeft.selection import plugins

Say = Callable[[str], None]
TOKENIZER = Model(shipped="llama-6m")  # for its vocabulary of 4,096; rows are tokens already


@dataclass(frozen=True)
class Options:
    """What is trained by which arms, in `rounds` fresh trainers each, of `steps` steps of which the first `warm_up` are not timed.

    In `epochs` over the same rows only the last is timed and counted; of the first, the whole is timed beside it.
    `trl`: arguments of `SFTConfig` that are not to be left at their defaults.
    """

    model: Model
    batch: Batch
    arms: Mapping[str, Any]
    reference: str
    trl: Mapping[str, Any] | None = None
    rounds: int = 5
    steps: int = 6
    warm_up: int = 2
    epochs: int = 1
    threads: int = 1
    seed: int = 0


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)
    able = [name for name in plugins.names(ARMS) if hasattr(plugins.get(ARMS, name), "config")]
    for arm in read_arms(options.arms, problems):
        if arm.name not in able:
            problems.add(f"arms.{arm.label}: {arm.name} has no config for a trainer; those that do: {', '.join(able)}")
    if options.reference not in options.arms:
        problems.add(f"reference: {unknown('label', options.reference, options.arms)}")
    if not 1 <= options.warm_up < options.steps:
        problems.add(f"warm_up: {options.warm_up} of {options.steps} steps; expected at least 1 and fewer than steps")
    if options.epochs < 1 or options.steps % options.epochs:
        problems.add(f"epochs: {options.epochs} of {options.steps} steps; expected as many steps in each")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """The arms' rows: operations and peak live bytes of one step, and ratios of step times."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    arms = {arm.label: arm for arm in read_arms(options.arms, Problems(case.name))}
    rows = {label: arm.to_dict() | {"counts": _counts(arm, options)} for label, arm in arms.items()}
    say("counted")
    order, draw = list(arms), random.Random(options.seed)
    times: dict[str, list[float]] = {label: [] for label in arms}
    firsts: dict[str, list[float]] = {label: [] for label in arms}
    for number in range(options.rounds):
        draw.shuffle(order)
        for label in order:
            watch = Watch()
            _train(arms[label], options, watch)
            times[label].append(statistics.median(watch.seconds[_timed_from(options) :]))
            firsts[label].append(sum(watch.seconds[: options.steps // options.epochs]))
        say(f"round {number + 1} of {options.rounds}")
    for label, row in clock.ratios(times, options.reference).items() if options.rounds else ():
        rows[label] |= {"time": row, "step_seconds": round(statistics.median(times[label]), 4)}
    for label, row in clock.ratios(firsts, options.reference).items() if options.rounds and options.epochs > 1 else ():
        rows[label] |= {"first_epoch": row}
    return {"arms": rows}


def _timed_from(options: Options) -> int:
    """The first step that is timed, from 0: those before it warm up, or belong to epochs before the last."""
    return max(options.warm_up, options.steps - options.steps // options.epochs if options.epochs > 1 else 0)


class Watch(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the forward pass."""
        self.start = clock.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimizer's step."""
        self.seconds.append(clock.now() - self.start)


class Counter(TrainerCallback):
    """Operations and peak live bytes of the step after so many."""

    def __init__(self, after: int) -> None:
        self.warm_up, self.open = after, ExitStack()
        self.found: dict[str, int] = {}

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Before the forward pass."""
        if state.global_step == self.warm_up:
            known = [*model.parameters(), *model.buffers(), *tensors_in(optimizer.state)]
            self.live = self.open.enter_context(watching(known))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After the optimizer's step."""
        if state.global_step == self.warm_up + 1:
            self.open.close()
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.found = {"trainable": trainable, "flops": self.live.flops, "peak_bytes": self.live.peak}


def _counts(arm: Arm, options: Options) -> dict[str, int]:
    last = _timed_from(options) + 1
    counter = Counter(last - 1)
    _train(arm, options, counter, steps=last)
    return counter.found


def _train(arm: Arm, options: Options, callback: TrainerCallback, steps: int | None = None) -> None:
    """One fresh model in one fresh trainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model: Any = build(options.model, seed=options.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder(TOKENIZER))
    count, vocabulary = steps or options.steps, min(model.config.vocab_size, len(tokenizer))
    every = options.steps // options.epochs if options.epochs > 1 else count
    drawn = batches(options.model, options.batch, vocabulary, count=every, seed=options.seed)
    rows = [row for batch in drawn for row in batch["input_ids"].tolist()]
    with tempfile.TemporaryDirectory() as output, _hushed():
        fixed = {"max_steps": count, "per_device_train_batch_size": options.batch.rows, "seed": options.seed}
        fixed["use_cpu"] = not torch.accelerator.is_available()  # bf16, TRL's default, is refused elsewise
        quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=output, **fixed, **quiet, **(options.trl or {})),
            train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
            processing_class=tokenizer,
            peft_config=arm.module.config(arm.options, num_layers(model)),
            callbacks=[callback],
        )
        trainer.train()


@contextmanager
def _hushed() -> Iterator[None]:
    """Takes in what trainers print."""
    with open(os.devnull, "w", encoding="utf-8") as away, redirect_stdout(away), redirect_stderr(away):
        yield


def tables(result: Mapping[str, Any]) -> str:
    """The arms as a Markdown table."""
    return table.arms(result["arms"], result["case"]["reference"])


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Bars of operations, bytes and time."""
    return chart.arms(result["arms"], result["case"]["reference"], result["title"], path)
