"""What a row says of a trainer. Classes are named by their paths and loaded where they are used."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerpeft.selection.typecheck import Setting

ALL = ("generate", "predict", "eval")


@dataclass(frozen=True)
class Row:
    """A trainer as recipes know it.

    `name`: as it stands in a recipe; `trainer` and `arguments`: its class, and that of its settings; `model`: transformers' class
    for the model, or a function of the recipe that names it; `task_type`: PEFT's, None where it has none; `data`: the `Task` that
    its rows are for, None of rows that TRL reads itself; `keys`: what a recipe may say beside the settings.
    """

    name: str
    trainer: str
    arguments: str
    model: str
    task_type: str | None = None
    data: str | None = None
    keys: Mapping[str, Setting] = field(default_factory=dict)
    trl: bool = False  # bf16 unless it is said otherwise, and a README.md with every checkpoint
    fused_head: bool = False  # the loss reads the output embeddings' weight, past any adapter
    answers: bool = False  # prompts are answered before and after
    one_number: bool = False  # the head gives one number, a reward
    one_class: bool = False  # a batch has one class a row as `labels`
    alone: bool = (
        True  # a model makes a loss of a batch by itself; else a choice by data waits for the trainer's own first step
    )
    each: int = 1  # sequences of a row in a batch
    evaluates: bool = True  # on held-out rows
    reference: bool = False  # held against the model as it was: the adapter switched off, and no copy of it
    writes: bool = False  # the model writes answers in training, of which it then learns
    beside: tuple[
        str, ...
    ] = ()  # modules that say what the trainer is given besides (`given`), and look at it before (`ready`)
    needs: tuple[str, ...] = ()  # keys without which there is no run
    used: tuple[str, ...] = ALL  # commands that what it trained is used by, on the recipe's own rows
    package: str | None = None  # that is not there unless the extra of the trainer's name is
    made: str | None = None  # what makes it of its class and what it is given, where that is not the class alone
    vectors: bool = False  # the loss is of vectors that are pooled of hidden states, a pass for each text of a row


def named(path: str) -> Any:
    """What stands at a dotted path, as `transformers.Trainer`."""
    place, _, name = path.rpartition(".")
    return getattr(_module(place), name)


def has(path: str) -> bool:
    """Whether something stands there; it is not loaded. Raises: ImportError where the module is not there."""
    place, _, name = path.rpartition(".")
    module = _module(place)
    return name in vars(module) or name in getattr(module, "__all__", ())


def _module(place: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")  # the table of trainers says so
        return importlib.import_module(place)
