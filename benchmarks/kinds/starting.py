"""What it costs to start: processor time of whole processes, from the first word to the exit code, that take turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock, table
from benchmarks.case import Case
from layerpeft.errors import Problems

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`commands`: words after `layerpeft`; `imports`: packages to import alone, beside them; each is started `rounds` times."""

    commands: list[str]
    imports: list[str]
    rounds: int = 5


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    if options.rounds < 1:
        problems.add(f"rounds: expected a whole number from 1, got {options.rounds}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Seconds of user and system time per process: median, quartiles and extremes."""
    options: Options = case.options
    torch.set_num_threads(1)  # nothing runs here; the processes' own time is what is read
    starts = {f"layerpeft {words}".strip(): ["-m", "layerpeft", *words.split()] for words in options.commands}
    starts |= {f"import {name}": ["-c", f"import {name}"] for name in options.imports}
    taken: dict[str, list[float]] = {name: [] for name in starts}
    for number in range(options.rounds + 1):
        for name, words in starts.items():
            seconds = processor_seconds(words)
            if number:  # the first round fills the disk's cache
                taken[name].append(seconds)
    for name, values in taken.items():
        say(f"{name}: {statistics.median(values):.3f} s")
    return {"starts": {name: clock.spread(values) for name, values in taken.items()}}


def processor_seconds(words: Sequence[str]) -> float:
    """User and system time of one process and of those it waited for; what it says is thrown away."""
    started = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, used = os.wait4(started.pid, 0)
    started.returncode = 0
    return used.ru_utime + used.ru_stime


def tables(result: Mapping[str, Any]) -> str:
    """One line per process."""
    lines = [
        [f"`{name}`", f"{row['median']:.2f} s", f"{row['lower']:.2f}–{row['upper']:.2f} s"]
        for name, row in result["starts"].items()
    ]
    return table.markdown(["process", "processor time", "quartiles"], lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
