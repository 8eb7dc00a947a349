"""A checked recipe, and what it says to the trainers and to PEFT."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerpeft.integrations.peft import HEADS
from layerpeft.integrations.places import expanded
from layerpeft.recipe import keys
from layerpeft.recipe.foreign import RENAMED
from layerpeft.recipe.shipped import SCHEME, resolve
from layerpeft.recipe.tasks.task import Task
from layerpeft.recipe.trainers.row import Row
from layerpeft.recipe.trainers.table import row_of, task_of
from layerpeft.recipe.yaml import dump, flow
from layerpeft.saving.checkpoints import last_checkpoint
from layerpeft.selection.select import Selection
from layerpeft.selection.typecheck import build
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.methods import METHODS
from layerpeft.tuners.soft import BY_SCORE, choosing_by

BOTH_WAYS = ("TOKEN_CLS", "QUESTION_ANS")  # PEFT trains the head whole, and counts it among all linears besides


@dataclass(frozen=True)
class Recipe:
    """A checked recipe in this version's words. `values`: the top level; `block`: the config's; `notices`: mappings;
    `sees`: its rows have pictures, and its model reads them; `lines`: where each top-level key was written; `config`: what method,
    `select` and block come to; `model`: its model without weights, once it was built."""

    source: str
    path: Path
    trainer: str
    values: Mapping[str, Any]
    method: str
    select: Any
    block: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    sees: bool = False
    lines: Mapping[str, int | None] = field(default_factory=dict)
    config: Any = field(default=None, compare=False, repr=False)
    model: Any = field(default=None, compare=False, repr=False)

    def __getitem__(self, key: str) -> Any:
        """The value of a top-level key, or its default."""
        return self.values.get(key, keys.top_settings(self.trainer)[key].default)

    def get(self, key: str) -> Any:
        """The value of a top-level key, or its default; None where its trainer has no such key."""
        return self[key] if key in keys.top_settings(self.trainer) else None

    @property
    def row(self) -> Row:
        """What tells its trainer from others."""
        return row_of(self.trainer, self.sees)

    @property
    def task(self) -> Task | None:
        """What its rows are for; None of rows that TRL reads itself."""
        return task_of(self.trainer, self.sees)

    @property
    def output_dir(self) -> Path:
        return expanded(self.values["output_dir"])


def is_compared(recipe: Recipe) -> bool:
    """Whether there are held-out rows, as far as a recipe says, and its trainer measures them: what arms are compared by."""
    said = recipe.values.get("eval_dataset") is not None or "dataset_test_split" in recipe.values
    return said and recipe.row.evaluates


def training_arguments(recipe: Recipe, **changes: Any) -> Any:
    """The settings of a recipe's trainer, as trl.SFTConfig or transformers.TrainingArguments.
    The order of the rows hangs on `data_seed` alone, so that arms of a comparison see the same batches."""
    given = {k: v for k, v in recipe.values.items() if k in keys.argument_settings(recipe.trainer)}
    if isinstance(given.get("resume_from_checkpoint"), bool):
        del given["resume_from_checkpoint"]
    kind = keys.arguments_class(recipe.trainer)
    given.setdefault("data_seed", given.get("seed", keys.argument_settings(recipe.trainer)["seed"].default))
    given.setdefault("report_to", "none")
    return kind(**given | changes)


def layer_config(recipe: Recipe, select: Any = None, batches: Any = None) -> LayerLoraConfig:
    """The PEFT config of a recipe, with another choice of layers when `select` is given. Raises: LayerpeftError."""
    other = select is not None and select is not recipe.select
    config: LayerLoraConfig = choosing_by(recipe.config, select) if other else recipe.config
    return config.with_batches(batches)


def unpacked(config: LayerLoraConfig) -> LayerLoraConfig:
    """A config under which every layer trains: with nothing frozen there is nothing to pack."""
    if config.quantize_frozen is None or config.quantize_trained is not None:
        return config
    return config.changed(quantize_frozen=None)


def as_chosen(recipe: Recipe, kept: Selection) -> dict[str, Any]:
    """What says a recorded choice again: its places, and its scores where ranks or learning rates go by them."""
    scored = kept.scores is not None and any(getattr(recipe.config, name) is not None for name in BY_SCORE)
    return kept.placed | ({"by": kept.scores, "keep": "all"} if scored else {})


def made(trainer: str, method: str, select: Any, block: Mapping[str, Any], sees: bool = False) -> LayerLoraConfig:
    """The config that a block means. Raises: LayerpeftError."""
    kind = METHODS[method]
    known = keys.block_settings(kind)
    fields = {name: build(known[name].hint, value) for name, value in block.items()}
    asked = fields.get("distill")
    if isinstance(asked, Mapping) and str(asked.get("teacher", "")).startswith(SCHEME):
        fields["distill"] = {**asked, "teacher": resolve(asked["teacher"])}
    task = row_of(trainer, sees).task_type if trainer else None
    if trainer and row_of(trainer, sees).vectors:
        fields.setdefault("train_new", False)  # the pooler, which hidden states never reach
    config: LayerLoraConfig = kind(select=select, task_type=task, **fields)
    everywhere = config.choosing.is_all and config.target_modules == "all-linear" and not config.works_by.in_place
    if everywhere and task in BOTH_WAYS and config.exclude_modules is None:
        return config.changed(exclude_modules=list(HEADS))
    return config


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe: keys mapped, settings applied, `select` in full, no secrets. `load_recipe` reads it back."""
    # what is said once, for one run, is left out: a copy of the recipe must not write over it again
    left = ("layerpeft", "hub_token", "overwrite_output_dir")
    order = [key for key in (*keys.own_keys(), *recipe.values) if key in recipe.values and key not in left]
    top = {key: recipe.values[key] for key in order}
    select = recipe.select if isinstance(recipe.select, str | int | list) else recipe.config.choosing.to_dict()
    if isinstance(select, dict) and isinstance(recipe.select, Mapping):
        select["by"] = recipe.select.get("by", "depth")  # a path stays a path
    return dump(top | {"layerpeft": {"method": recipe.method, "select": select, **recipe.block}})


def command_of(recipe: Recipe, changed: Mapping[str, Any] | None = None, verb: str = "train") -> str:
    """A command that runs the recipe with these settings changed, each written once, to paste into a shell."""
    kept, changed = [], changed or {}
    for setting in recipe.settings:
        name = setting.partition("=")[0].strip()
        name = RENAMED.get(name, name)
        if not any(name == new or name.startswith(f"{new}.") for new in changed):
            kept.append(setting)
    return shlex.join(["layerpeft", verb, recipe.source, *kept, *settings_of(changed)])


def settings_of(changed: Mapping[str, Any]) -> list[str]:
    """Settings as `key=value`."""
    return [f"{key}={flow(value)}" for key, value in changed.items()]


def checkpoint_of(recipe: Recipe) -> str | None:
    """What the run goes on from: a folder that is named, or the last one in its own; None where it begins anew."""
    asked = recipe["resume_from_checkpoint"]
    if asked is True:
        return last_checkpoint(recipe.output_dir)
    return str(expanded(asked)) if isinstance(asked, str) else None
