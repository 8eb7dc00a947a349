"""What wrapping a model costs: `get_peft_model` of layerpeft against PEFT's own, on fresh models that take turns."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from layerpeft.selection import layer_numbers

Say = Callable[[str], None]


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
    """Ratios of layerpeft's time to PEFT's, for all layers and for some."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    base = build(Model(shape=options.shape), seed=options.seed)
    numbers = list(layer_numbers(options.layers, SHAPES[options.shape]["num_hidden_layers"]))
    plain: dict[str, Any] = {"r": options.r, "target_modules": LINEARS}
    some = plain | {"layers_to_transform": numbers, "layers_pattern": "layers"}
    configs: dict[str, Callable[[], Any]] = {
        "all layers": lambda: (peft.LoraConfig(**plain), layerpeft.LayerLoraConfig(**plain)),
        options.layers: lambda: (peft.LoraConfig(**some), layerpeft.LayerLoraConfig(**plain, select=options.layers)),
    }
    rows = {}
    for name, made in configs.items():
        steps = {
            "peft": lambda made=made: _once(peft.get_peft_model, base, made()[0]),
            "layerpeft": lambda made=made: _once(layerpeft.get_peft_model, base, made()[1]),
        }
        times = _times(steps, options)
        rows[name] = clock.ratios(times, "peft")["layerpeft"] | {
            "peft_seconds": round(statistics.median(times["peft"]), 5)
        }
        say(f"{name}: {rows[name]['median']:.3f} of PEFT's time")
    return {"wrapping": rows}


def _once(wrap: Callable[..., Any], base: Any, config: Any) -> float:
    """Seconds of one wrapping of a fresh copy."""
    model = copy.deepcopy(base)
    with still():
        return clock.seconds(lambda: wrap(model, config))


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
        [name, f"{1000 * row['peft_seconds']:.0f} ms", table.ratio_text(row)]
        for name, row in result["wrapping"].items()
    ]
    return table.markdown(["layers", "PEFT", "layerpeft over PEFT"], lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""
