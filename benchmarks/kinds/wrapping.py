"""What wrapping a model costs: `get_peft_model` of layerpeft against PEFT's own, on fresh models that take turns."""

from __future__ import annotations

import copy
import cProfile
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch

import layerpeft
from benchmarks import clock, table
from benchmarks.case import Case
from benchmarks.count import still
from benchmarks.model import LINEARS, SHAPES, Model, build
from layerpeft.errors import Problems, unknown
from layerpeft.selection.grammar import layer_numbers

Say = Callable[[str], None]
WRAPS: Mapping[str, Callable[..., Any]] = {"peft": peft.get_peft_model, "layerpeft": layerpeft.get_peft_model}


@dataclass(frozen=True)
class Options:
    """`rounds` fresh models of a shape; `layers` (the grammar) are wrapped by both, and then all layers by both."""

    shape: str
    layers: str = "last:25%"
    r: int = 8
    rounds: int = 30
    threads: int = 1
    seed: int = 0


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    if options.shape not in SHAPES:
        problems.add(f"shape: {unknown('shape', options.shape, SHAPES)}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Ratios of layerpeft's time and function calls to PEFT's, for all layers and for some.

    `fastest`: the shortest of all rounds over PEFT's shortest, which others on the machine disturb least.
    """
    options: Options = case.options
    torch.set_num_threads(options.threads)
    base, rows, counted = _base(options), {}, calls(options)
    for name, configs in _configs(options).items():
        steps = {which: partial(_once, WRAPS[which], base, made) for which, made in configs.items()}
        times = _times(steps, options)
        rows[name] = clock.ratios(times, "peft")["layerpeft"] | {
            "peft_seconds": round(statistics.median(times["peft"]), 5),
            "fastest": round(min(times["layerpeft"]) / min(times["peft"]), 4),
            "calls": counted[name],
        }
        say(f"{name}: {rows[name]['median']:.3f} of PEFT's time")
    return {"wrapping": rows}


def calls(options: Options) -> dict[str, float]:
    """Function calls of layerpeft's wrapping over those of PEFT's: a count that does not depend on the machine."""
    base, found = _base(options), {}
    for name, configs in _configs(options).items():
        count = {which: _calls(WRAPS[which], base, made) for which, made in configs.items()}
        found[name] = round(count["layerpeft"] / count["peft"], 4)
    return found


def _base(options: Options) -> Any:
    return build(Model(shape=options.shape), seed=options.seed)


def _configs(options: Options) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each choice of layers, what makes a config for each of the two."""
    numbers = list(layer_numbers(options.layers, SHAPES[options.shape]["num_hidden_layers"]))
    plain: dict[str, Any] = {"r": options.r, "target_modules": LINEARS}
    some = plain | {"layers_to_transform": numbers, "layers_pattern": "layers"}
    ours = partial(layerpeft.LayerLoraConfig, **plain)
    return {
        "all layers": {"peft": partial(peft.LoraConfig, **plain), "layerpeft": ours},
        options.layers: {"peft": partial(peft.LoraConfig, **some), "layerpeft": partial(ours, select=options.layers)},
    }


def _once(wrap: Callable[..., Any], base: Any, made: Callable[[], Any]) -> float:
    """Seconds of one wrapping of a fresh copy."""
    model, config = copy.deepcopy(base), made()
    with still():
        return clock.seconds(lambda: wrap(model, config))


def _calls(wrap: Callable[..., Any], base: Any, made: Callable[[], Any]) -> int:
    for _ in range(2):  # the first fills caches
        model, config, watch = copy.deepcopy(base), made(), cProfile.Profile()
        with still():
            watch.enable()
            wrap(model, config)
            watch.disable()
    return sum(int(entry.callcount) for entry in watch.getstats())


def _times(steps: Mapping[str, Callable[[], float]], options: Options) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 2):
        order = list(steps) if number % 2 else list(steps)[::-1]
        for name in order:
            taken = steps[name]()
            if number >= 2:  # the first two warm up
                found[name].append(taken)
    return found


def tables(result: Mapping[str, Any]) -> str:
    """One line per choice of layers."""
    lines = [
        [
            name,
            f"{1000 * row['peft_seconds']:.0f} ms",
            f"{row['calls']:.3f}",
            table.ratio_text(row),
            f"{row['fastest']:.3f}",
        ]
        for name, row in result["wrapping"].items()
    ]
    return table.markdown(
        ["layers", "PEFT", "function calls over PEFT's", "time over PEFT's", "fastest over fastest"], lines
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
