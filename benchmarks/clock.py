"""Step times as ratios: arms take turns in one process, every round is a pair with the reference, and medians are quoted."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def wait() -> None:
    """Lets an accelerator finish what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def kind() -> str:
    """Which time is taken: on an accelerator or with several threads the wall's, with one thread the processor's own.

    A thread that has to wait because others use the machine spends no processor time; alone on a machine the two are equal.
    """
    return "wall" if torch.accelerator.is_available() or torch.get_num_threads() > 1 else "processor"


def now() -> float:
    """Seconds on the clock of that kind, once an accelerator has finished what it was given."""
    wait()
    return time.perf_counter() if kind() == "wall" else time.process_time()


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = now()
    function()
    return now() - start


def interleaved(steps: Mapping[str, Callable[[], Any]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per round and arm. Every round runs each arm once, in an order drawn anew, so that drift meets all alike."""
    order, draw = list(steps), random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            found[name].append(seconds(steps[name]))
    return found


def ratios(times: Mapping[str, Sequence[float]], reference: str, paired: bool = True) -> dict[str, dict[str, float]]:
    """Median, quartiles and extremes of an arm's time over the reference's; round by round where the arms took turns."""
    unit = statistics.median(times[reference])
    found = {}
    for name, values in times.items():
        under = times[reference] if paired else [unit] * len(values)
        found[name] = spread([a / b for a, b in zip(values, under, strict=True)])
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes, four digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    named = {"median": middle, "lower": low, "upper": high, "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in named.items()}
