"""The runs of a design, each with a key of its own, in the order in which they are worth most."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

from benchmarks.evidence.design import Design, Method

PARTS = ("rates", "criteria", "oracle", "final", "matched", "methods", "more")  # more of all cells comes last
FIRST = ("rates", "criteria")  # others rest on these
TUNING = 1000  # the seed by which a rate is chosen; of methods, and all layers, this and the next


@dataclass(frozen=True)
class Run:
    """What is done once. `train`: `steps` steps of a method on layers (`select`: numbers, or a schedule), from a seed, with
    `epoch` on the rows of so many batches again and again; `score`: a criterion's scores, on batches of a seed; `choose`: which
    layers a rule takes of them."""

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
    epoch: int = 0

    @property
    def key(self) -> str:
        """Everything that it is, as one line."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Setting:
    """A cell of a design, and the rate at which so many layers, or fewer, train."""

    design: Design
    cell: str
    rates: Mapping[int, float]

    def run(self, layers: Sequence[int], seed: int, r: int = 0, steps: int = 0, epoch: int = 0) -> Run:
        """LoRA on these layers, by the design's training unless it says otherwise."""
        size = min((s for s in self.rates if s >= len(layers)), default=max(self.rates))
        rank, steps = r or self.design.training.r, steps or self.design.steps(self.cell)
        return Run(self.cell, "train", seed, list(layers), "lora", rank, self.rates[size], steps, epoch=epoch)


def rated(design: Design, cell: str, size: int) -> Iterator[Run]:
    """So many layers at each rate, twice: the last ones and as many evenly apart; all of them by two seeds."""
    count = design.layers(cell)
    last = tuple(range(count - size, count))
    apart = tuple(i * (count - 1) // max(1, size - 1) for i in range(size))
    for lr in design.training.rates:
        at = Setting(design, cell, {size: lr})
        yield at.run(last, TUNING)
        yield at.run(*((last, TUNING + 1) if apart == last else (apart, TUNING)))


def sets(design: Design, cell: str) -> list[tuple[int, ...]]:
    """The sets that are drawn for a cell: no two alike, the same at any time; the oracle's first, then those that are added."""
    count, keep = design.layers(cell), design.oracle.keep
    every = list(combinations(range(count), keep))
    return random.Random(f"{cell} {keep}").sample(every, min(design.num_sets(cell), len(every)))


def oracle(at: Setting) -> Iterator[Run]:
    """Every layer alone, all layers, the last of them, and the drawn sets; seed by seed."""
    design, count = at.design, at.design.layers(at.cell)
    for seed in design.oracle.seeds:
        for layers in (range(count), *((i,) for i in range(count)), range(count - design.oracle.keep, count)):
            yield at.run(layers, seed)
    for seed in design.oracle.seeds:
        for layers in sets(design, at.cell)[: design.oracle.sets]:
            yield at.run(layers, seed)


def more(at: Setting) -> Iterator[Run]:
    """The other drawn sets, and every pair of layers, where the design has them."""
    design = at.design
    for seed in design.oracle.seeds:
        for layers in sets(design, at.cell)[design.oracle.sets :]:
            yield at.run(layers, seed)
    for seed in design.oracle.seeds if at.cell in design.oracle.pairs else ():
        for layers in combinations(range(design.layers(at.cell)), 2):
            yield at.run(layers, seed)


def scores(design: Design, cell: str) -> Iterator[Run]:
    """Every criterion on batches of the oracle's seeds; those that are compared in the end, in its cells, of the others too."""
    compared = {part for name in design.final.criteria for part in design.criteria.products.get(name, (name,))}
    for seed in design.criteria.seeds:
        every = seed in design.oracle.seeds
        for name, select in design.criteria.scores.items():
            if every or (name in compared and cell in design.final.cells):
                yield Run(cell, "score", seed, {"name": name, **select})
        for name, select in design.criteria.rules.items() if every else ():
            yield Run(cell, "choose", seed, {"name": name, "keep": design.oracle.keep, **select})


def tuned(design: Design, cell: str) -> Iterator[Run]:
    """Every other method at each of its rates."""
    for method in design.methods.values():
        yield from rates_of(design, cell, method)


def rates_of(design: Design, cell: str, method: Method) -> Iterator[Run]:
    """A method at each of its rates."""
    for lr in method.rates:
        for seed in (TUNING, TUNING + 1):
            yield of_method(design, cell, method, seed, lr)


def of_method(design: Design, cell: str, method: Method, seed: int, lr: float, steps: int = 0) -> Run:
    r = design.training.r if method.method == "lora" else 0
    given = (method.method, r, lr, steps or design.steps(cell), method.ends, dict(method.options))
    return Run(cell, "train", seed, method.select, *given)


def counted(design: Design, cell: str, method: Method) -> Run:
    """The run of a method whose operations are counted, which is slow, and the same for every seed and rate."""
    return of_method(design, cell, method, TUNING, method.rates[0])


def counts(design: Design, one: Run) -> bool:
    """Whether operations of a run are counted."""
    return one.seed == TUNING and any(one == counted(design, one.cell, method) for method in design.methods.values())


def methods(design: Design, cell: str, best: Mapping[str, float], steps: Mapping[str, int]) -> Iterator[Run]:
    """Every method at its best rate, with the final seeds; then for as many `steps` as equal time gives it, where that is known."""
    for longer in (False, True):
        for seed in design.final.seeds:
            for name, method in design.methods.items():
                if name in best and (name in steps or not longer):
                    yield of_method(design, cell, method, seed, best[name], steps[name] if longer else 0)
