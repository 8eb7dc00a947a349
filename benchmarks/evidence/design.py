"""What the experiment is: `design.yaml`, read whole; everything wrong with it is reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.case import read
from layerpeft.errors import ConfigError, Problems, unknown
from layerpeft.recipe.yaml import parse

HERE = Path(__file__).parent
DESIGN = HERE / "design.yaml"
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A model: `shipped` in the package, or `made` here as this shape, by some steps on the text of pre-training."""

    shipped: str | None = None
    made: Literal["modernbert", "gpt2"] | None = None
    layers: int = 12
    width: int = 128
    heads: int = 4
    mlp: int = 512
    steps: int = 3000
    rows: int = 16
    length: int = 128
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """Rows of JSONL files, `text` a template; with `label`, the column of classes. `rows` of a batch, `held_out` rows evaluated;
    `steps` where a run has others than elsewhere."""

    train: str
    eval: str
    text: str
    rows: int
    length: int
    held_out: int
    label: str | None = None
    steps: int = 0


@dataclass(frozen=True)
class Training:
    """LoRA on the chosen layers: rank, the learning rates that are tried, steps."""

    r: int
    rates: Sequence[float]
    steps: int


@dataclass(frozen=True)
class Oracle:
    """Which sets of layers are trained to know what they bring."""

    seeds: Sequence[int]
    keep: int
    sets: int
    more: Mapping[str, Any] = field(default_factory=dict)
    pairs: Sequence[str] = ()


@dataclass(frozen=True)
class Criteria:
    """What is asked which layers to take: `scores` by `select`, `products` of their ranks, and `rules` beside them."""

    seeds: Sequence[int]
    num_batches: int
    scores: Mapping[str, Any]
    products: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Final:
    """What is compared in the end: by seeds, choices of these criteria in these cells, with the other number of layers, and as many
    as shares of the operations of training all layers hold."""

    seeds: Sequence[int]
    half: int
    shares: Sequence[float] = ()
    criteria: Sequence[str] = ()
    cells: Sequence[str] = ()


@dataclass(frozen=True)
class Choice:
    """Layers by a criterion: the best `count`, or the best set within a `share` of the operations of all layers."""

    criterion: str
    count: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Matched:
    """What choices need for the loss that all layers reach in `epochs` of `steps` batches each: runs of so many epochs. That loss
    may lack `within` of the gain of all layers."""

    seeds: Sequence[int]
    steps: int
    epochs: int
    lengths: Sequence[int]
    within: float = 0.0
    cells: Sequence[str] = ()


@dataclass(frozen=True)
class Method:
    """Another way to train, as a recipe's block says it. `ends`: embeddings, final norm and head train besides."""

    method: Literal["lora", "full", "galore"]
    select: Any
    rates: Sequence[float]
    ends: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retention:
    """Rows of the text of pre-training on which the loss is taken again."""

    text: str
    rows: int
    length: int


@dataclass(frozen=True)
class Pretraining:
    """The text that models are made from."""

    text: str
    held_out: str


@dataclass(frozen=True)
class Design:
    """The whole of it. `cells` are `model/task`, in the order in which they run."""

    registered: str
    about: str
    models: Mapping[str, Source]
    tasks: Mapping[str, Task]
    cells: Sequence[str]
    training: Training
    oracle: Oracle
    criteria: Criteria
    final: Final
    choices: Mapping[str, Choice]
    matched: Matched
    methods: Mapping[str, Method]
    retention: Retention
    pretraining: Pretraining
    method_cells: Sequence[str] = ()
    changed: Sequence[Any] = ()

    def of(self, cell: str) -> tuple[Source, Task]:
        """The model and the task of a cell."""
        model, _, task = cell.partition("/")
        return self.models[model], self.tasks[task]

    def layers(self, cell: str) -> int:
        """How many layers the model of a cell has."""
        return self.of(cell)[0].layers

    def steps(self, cell: str) -> int:
        """How many steps a run of a cell has."""
        return self.of(cell)[1].steps or self.training.steps

    def num_sets(self, cell: str) -> int:
        """How many sets of the quarter are drawn in all."""
        return max(self.oracle.sets, int(self.oracle.more.get(cell, 0)))

    def sizes(self, cell: str) -> tuple[int, ...]:
        """The numbers of layers for which rates are tuned, ascending."""
        return (self.oracle.keep, self.final.half, self.layers(cell))


TABLES = {"models": Source, "tasks": Task, "choices": Choice, "methods": Method}
BLOCKS = {
    "training": Training, "oracle": Oracle, "criteria": Criteria, "final": Final, "matched": Matched, "retention": Retention,
    "pretraining": Pretraining,
}  # fmt: skip


def load(path: Path = DESIGN) -> Design:
    """The design in a file. Raises: ConfigError that names every problem."""
    problems = Problems(f"design {path.name}")
    document = parse(path.read_text(encoding="utf-8"))
    for fault in document.faults:
        problems.add(str(fault))
    problems.raise_if_any(ConfigError)
    given: dict[str, Any] = dict(document.data)
    given["registered"] = str(given.get("registered", ""))
    for name, kind in TABLES.items():
        rows = {key: read(kind, row, problems, f"{name}.{key}.") for key, row in (given.get(name) or {}).items()}
        given[name] = rows
    for name, kind in BLOCKS.items():
        given[name] = read(kind, given.get(name) or {}, problems, f"{name}.")
    problems.raise_if_any(ConfigError)
    lacking = [name for name in ("about", "cells") if not given.get(name)]
    for name in lacking:
        problems.add(f"{name}: missing")
    for name in given:
        if name not in Design.__dataclass_fields__:
            problems.add(unknown("key", name, list(Design.__dataclass_fields__)))
    problems.raise_if_any(ConfigError)
    design = Design(**given)
    _check(design, problems)
    problems.raise_if_any(ConfigError)
    return design


def _check(design: Design, problems: Problems) -> None:
    parts = (design.oracle.pairs, design.oracle.more, design.final.cells, design.matched.cells, design.method_cells)
    for cell in (*design.cells, *chain.from_iterable(parts)):
        model, _, task = cell.partition("/")
        if model not in design.models:
            problems.add(f"{cell}: {unknown('model', model, list(design.models))}")
        if task not in design.tasks:
            problems.add(f"{cell}: {unknown('task', task, list(design.tasks))}")
    for name, model in design.models.items():
        if (model.shipped is None) == (model.made is None):
            problems.add(f"models.{name}: give one of shipped and made")
    for name, parts in design.criteria.products.items():
        for part in parts:
            if part not in design.criteria.scores:
                problems.add(f"criteria.products.{name}: {unknown('score', part, list(design.criteria.scores))}")
    known = [*design.criteria.scores, *design.criteria.products]
    for name in (name for name in design.final.criteria if name not in known):
        problems.add(f"final.criteria: {unknown('criterion', name, known)}")
    for name, choice in design.choices.items():
        if choice.criterion not in known:
            problems.add(f"choices.{name}: {unknown('criterion', choice.criterion, known)}")
        if (choice.count > 0) == (choice.share > 0):
            problems.add(f"choices.{name}: give one of count and share")
    if not design.training.rates:
        problems.add("training.rates: none given")
    for name, method in design.methods.items():
        if not method.rates:
            problems.add(f"methods.{name}.rates: none given")
