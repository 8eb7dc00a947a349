"""The runs of a design, each with a key of its own, in the order in which they are worth most."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

from benchmarks.evidence.design import Design, Method

PARTS = ("criteria", "oracle", "final", "methods", "pairs")  # pairs of all cells come last
TUNING = 1000  # the seed by which a rate is chosen


@dataclass(frozen=True)
class Run:
    """What is done once. `train`: `steps` steps of a method on layers (`select`: numbers, or a schedule), from a seed; `score`: a
    criterion's scores, on batches of a seed; `choose`: which layers a rule takes of them."""

    cell: str
    kind: Literal["train", "score", "choose"]
    seed: int
    select: Any
    method: str = "lora"
    r: int = 0
    lr: float = 0.0
    steps: int = 0
    ends: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Everything that it is, as one line."""
        return json.dumps(asdict(self), sort_keys=True)


def layers_run(design: Design, cell: str, layers: Sequence[int], seed: int, r: int = 0, steps: int = 0) -> Run:
    """LoRA on these layers, by the design's training unless it says otherwise."""
    asked = design.training
    return Run(cell, "train", seed, list(layers), "lora", r or asked.r, asked.lr, steps or asked.steps)


def sets(design: Design, cell: str) -> list[tuple[int, ...]]:
    """The sets that are drawn for a cell, and every layer's own: no two alike, the same at any time."""
    count, keep = design.layers(cell), design.oracle.keep
    every = list(combinations(range(count), keep))
    return sorted(random.Random(f"{cell} {keep}").sample(every, min(design.num_sets(cell), len(every))))


def oracle(design: Design, cell: str) -> Iterator[Run]:
    """Every layer alone, all layers, the last of them, and the drawn sets; seed by seed."""
    count = design.layers(cell)
    for seed in design.oracle.seeds:
        for layers in (range(count), *((i,) for i in range(count)), range(count - design.oracle.keep, count)):
            yield layers_run(design, cell, layers, seed)
    for seed in design.oracle.seeds:
        for layers in sets(design, cell):
            yield layers_run(design, cell, layers, seed)


def pairs(design: Design, cell: str) -> Iterator[Run]:
    """Every pair of layers, where the design has them."""
    for seed in design.oracle.seeds if cell in design.oracle.pairs else ():
        for layers in combinations(range(design.layers(cell)), 2):
            yield layers_run(design, cell, layers, seed)


def scores(design: Design, cell: str) -> Iterator[Run]:
    """Every criterion on batches of every seed."""
    for seed in design.criteria.seeds:
        for name, select in design.criteria.scores.items():
            yield Run(cell, "score", seed, {"name": name, **select})
        for name, select in design.criteria.rules.items():
            yield Run(cell, "choose", seed, {"name": name, "keep": design.oracle.keep, **select})


def tuned(design: Design, cell: str) -> Iterator[Run]:
    """Every other method at each of its rates."""
    for method in design.methods.values():
        yield from rates_of(design, cell, method)


def rates_of(design: Design, cell: str, method: Method) -> Iterator[Run]:
    """A method at each of its rates."""
    for lr in method.rates:
        yield of_method(design, cell, method, TUNING, lr)


def of_method(design: Design, cell: str, method: Method, seed: int, lr: float, steps: int = 0) -> Run:
    r = design.training.r if method.method == "lora" else 0
    given = (method.method, r, lr, steps or design.training.steps, method.ends, dict(method.options))
    return Run(cell, "train", seed, method.select, *given)


def methods(design: Design, cell: str, best: Mapping[str, float], steps: Mapping[str, int]) -> Iterator[Run]:
    """Every method at its best rate, with the final seeds; then for as many `steps` as equal time gives it, where that is known."""
    for longer in (False, True):
        for seed in design.final.seeds:
            for name, method in design.methods.items():
                if name in best and (name in steps or not longer):
                    yield of_method(design, cell, method, seed, best[name], steps[name] if longer else 0)
