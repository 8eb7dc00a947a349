"""`layerpeft plan`: what a recipe will cost, before any weight is loaded, or everything that is wrong with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from layerpeft.errors import LayerpeftError, Problem, RecipeError
from layerpeft.integrations import hub
from layerpeft.integrations.engines import known
from layerpeft.model.precisions import missing_packages
from layerpeft.planning import optimizer_bytes
from layerpeft.planning.engines import Cards
from layerpeft.planning.fit import Fit, fit
from layerpeft.planning.plan import Plan, plan
from layerpeft.planning.prefix import Rows
from layerpeft.planning.text import rows_lines
from layerpeft.planning.trace import Step
from layerpeft.recipe import keys, rows
from layerpeft.recipe.besides import beside_of, longest_prompt
from layerpeft.recipe.model import loading
from layerpeft.recipe.read import Examined, examine, located
from layerpeft.recipe.recipe import Recipe, command_of, layer_config, settings_of, training_arguments
from layerpeft.recipe.shorter import without_weights
from layerpeft.recipe.sources import named
from layerpeft.recipe.surroundings import on_hub
from layerpeft.recipe.tasks.tokenizing import longest
from layerpeft.recipe.tokens import WHAT, amount
from layerpeft.recipe.trainer import Setup, prepare, tokenized
from layerpeft.recipe.yaml import Fault
from layerpeft.training.exits import with_exits

ROWS = ("dataset_name", "eval_dataset", "columns", "dataset_text_field")
DEFAULT_LENGTH = 1024
TRIED = 64  # rows that a plan turns into tokens


@dataclass(frozen=True)
class Forecast:
    """A recipe with its plan, or with the largest choice that fits; `command` trains that, after `before` where that is said.
    `rows`: how it goes over its rows."""

    recipe: Recipe
    found: Plan | Fit
    command: str
    rows: Rows | None = None
    before: str | None = None

    @property
    def plan(self) -> Plan:
        """The plan, of what fits where that was asked."""
        return self.found.plan if isinstance(self.found, Fit) else self.found

    @property
    def changes(self) -> list[str]:
        """The settings, as `key=value`, that make the recipe fit."""
        return settings_of(self.found.settings) if isinstance(self.found, Fit) else []

    def __str__(self) -> str:
        kept = self.plan.prefix
        lines = [str(self.found), *(rows_lines(kept, self.rows) if kept is not None and self.rows is not None else ())]
        if isinstance(self.found, Fit):
            lines += ["\nto train this:", *(f"  {command}" for command in (self.before, self.command) if command)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self.plan) | {"peak_bytes": self.plan.peak_bytes, "parts": dict(self.plan.parts)}
        plain["rows"] = [row.to_dict() for row in self.plan.rows]
        plain["share"] = self.plan.share and self.plan.share.to_dict()
        plain["prefix"] = self.plan.prefix and self.plan.prefix.to_dict() | (
            self.rows.to_dict(self.plan.prefix) if self.rows else {}
        )
        if isinstance(self.found, Plan):
            return plain
        found = self.found
        return {
            "plan": plain,
            "gave_up": list(found.gave_up),
            "settings": dict(found.settings),
            "command": self.command,
            "before": self.before,
            "per_device_train_batch_size": found.batch_size,
            "gradient_checkpointing": found.checkpointing,
            "r": found.config.r,
        }


def forecast(
    source: str,
    settings: Sequence[str] = (),
    limit: str | None = None,
    accelerator: bool | None = None,
    cards: Cards | None = None,
) -> Forecast:
    """The plan of a recipe; with `limit` ("24GB"), the largest choice that fits and what it gives up.

    `accelerator`: count as on a GPU (None: where there is one); `cards`: several, each of which has that much room.
    Raises: RecipeError with every problem of the recipe at once, those of rows and optimizer included; ConfigError where
    nothing fits.
    """
    recipe, model, options, setup = asked(source, settings, accelerator, cards)
    config = layer_config(recipe)
    engine = next((e for e in known.ENGINES if cards is not None and e.key == cards.engine.name), None)
    if engine is not None and (refused := engine.refusals(sorted(config.needs(batches=True)))):
        raise RecipeError(*refused)
    options |= {} if limit is None else {"packing": _packing(), "each": _each(recipe, options)}
    found = plan(model, config, **options) if limit is None else fit(model, config, limit, **options)
    changed = found.settings if isinstance(found, Fit) else {}
    before = command_of(recipe, changed, "prefill") if isinstance(found, Fit) and found.apart is not None else None
    return Forecast(recipe, found, command_of(recipe, changed), rows_of(recipe, setup, options, found), before)


def asked(
    source: str, settings: Sequence[str], accelerator: bool | None, cards: Cards | None
) -> tuple[Recipe, nn.Module, dict[str, Any], Setup]:
    """A recipe, its model without weights, what `plan` is told of it, and its rows. Raises: RecipeError."""
    there = torch.accelerator.is_available()
    examined = examine(source, settings, "plan", bool(accelerator) and not there)
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet when they are imported
        setup, problems = _prepared(examined)
        recipe = examined.sound(problems)
        model = empty(setup)
    elsewhere = bool(accelerator) and not there
    options = told(recipe, setup, there if accelerator is None else accelerator, elsewhere)
    return recipe, model, options | {"step": replace(options["step"], cards=cards)}, setup


def told(recipe: Recipe, setup: Setup, accelerator: bool, elsewhere: bool = False) -> dict[str, Any]:
    """What `plan`, `fit` and `cost` are told of a recipe, its rows and what its trainer holds beside the model included."""
    arguments = arguments_of(recipe, elsewhere)
    options = options_of(recipe, arguments, accelerator)
    if recipe.task is not None:
        options["length"] = min(options["length"], longest(recipe, setup.tokenizer) or options["length"])
    if recipe.row.vectors:  # a pass for each text of a row, all of which are there until the way back
        texts = [name for name in setup.train.column_names if name != "label"]
        options["batch_size"] = options["batch_size"] // recipe.row.each * len(texts)
    besides = beside_of(recipe, arguments)
    if besides is not None and besides.writing is not None and recipe.get("max_length") is None:
        known = longest_prompt(setup, TRIED)
        options["length"] = min(options["length"], known + besides.writing.tokens) if known else options["length"]
    return options | {"step": replace(options["step"], beside=besides)}


def rows_of(recipe: Recipe, setup: Setup, options: Mapping[str, Any], found: Plan | Fit) -> Rows | None:
    """How a training goes over the rows of a recipe; None where they are prepared elsewhere."""
    parts = zip(WHAT.values(), (setup.train, setup.held_out), strict=True)
    read = {
        what: amount(part, setup.counts[what], setup.counts[what].read)
        for what, part in parts
        if what in setup.counts and part is not None and "input_ids" in part.column_names
    }
    train, held_out = ({**setup.amounts, **read}.get(what) for what in WHAT.values())
    if train is None or not train.rows:
        return None
    batch, passes = options["batch_size"] // _each(recipe, options), options["step"].accumulation
    if isinstance(found, Fit):
        batch, passes = found.batch_size, found.accumulation
    cards = options["step"].cards
    processes = cards.processes if cards is not None else 1
    steps = recipe["max_steps"]
    epochs = steps * batch * passes * processes / train.rows if steps > 0 else float(recipe["num_train_epochs"])
    evaluated = held_out.tokens if held_out is not None else 0
    return Rows(epochs, train.tokens, evaluated, train.about, batch)


def _each(recipe: Recipe, options: Mapping[str, Any]) -> int:
    """How many sequences a row of the recipe is."""
    return options["batch_size"] // int(recipe["per_device_train_batch_size"])


def empty(setup: Setup) -> nn.Module:
    """The recipe's model without weights, with its exits. How many classes a head has is known with the rows alone."""
    model: Any = setup.recipe.model
    if setup.labels and len(setup.labels) != model.config.num_labels:
        model = without_weights(setup.recipe, *setup.head).recipe.model
    if setup.recipe["exits"] is not None:
        with_exits(model, setup.recipe["exits"], setup.recipe.config.choosing.stack)
    return model


def arguments_of(recipe: Recipe, elsewhere: bool = False) -> Any:
    """The recipe's training arguments; `elsewhere`: for a device that is not here, mixed precision left out."""
    if not elsewhere:
        return training_arguments(recipe)
    values = {k: v for k, v in recipe.values.items() if k not in ("bf16", "fp16")}
    return training_arguments(replace(recipe, values=values), bf16=False)


def options_of(recipe: Recipe, arguments: Any, accelerator: bool) -> dict[str, Any]:
    """What `plan` and `fit` are told of a recipe."""
    packed = any(getattr(arguments, name, False) for name in ("packing", "padding_free"))
    here, quantization = accelerator and not arguments.use_cpu, loading(recipe).get("quantization_config")
    step = Step(
        autocast=_precision(recipe, arguments),
        checkpointing_kwargs=arguments.gradient_checkpointing_kwargs or {},
        fused_head=recipe.row.fused_head,
        padded=not packed,
        packed=packed,
        in_place=here,
        optim_args=arguments.optim_args,
        quantization=quantization if isinstance(quantization, BitsAndBytesConfig) else None,
        accumulation=arguments.gradient_accumulation_steps,
    )
    return {
        "batch_size": arguments.per_device_train_batch_size * recipe.row.each,
        "length": recipe.get("max_length") or DEFAULT_LENGTH,
        "optimizer": optimizer_of(arguments),
        "checkpointing": bool(arguments.gradient_checkpointing),
        "step": step,
    }


def optimizer_of(arguments: Any) -> str:
    """transformers' name of the optimizer."""
    return str(getattr(arguments.optim, "value", arguments.optim))


def _prepared(examined: Examined) -> tuple[Any, list[Fault]]:
    """Tokenizer and rows, as far as nothing is wrong with their keys; and what is wrong with them or with the optimizer."""
    recipe, wrong = examined.recipe, examined.wrong
    problems: list[Fault] = []
    values = recipe.values
    if not recipe.trainer:
        return None, problems
    name = values.get("optim", keys.top_settings(recipe.trainer)["optim"].default)
    sentence = None if "optim" in wrong else optimizer_bytes.problem(str(getattr(name, "value", name)))
    if sentence:
        problems.append(located(recipe, Problem(("optim",), f"optim: {sentence}")))
    if wrong & set(ROWS) or "dataset_name" not in values:
        return None, problems
    with hub.settled(on_hub(values)):
        try:
            if "model_name_or_path" in wrong or "model_name_or_path" not in values:
                for one in named(values["dataset_name"]):
                    split = one.split or recipe["dataset_train_split"]
                    rows.load(one.path, config=one.config or recipe["dataset_config"], split=split)
                return None, problems
            setup = prepare(recipe)
            if not examined.problems:
                setup = tokenized(setup, TRIED)
            return setup, problems
        except LayerpeftError as error:
            keyless = (Problem(("dataset_name",), f"dataset_name: {p.text}") for p in error.listed() if not p.path)
            return None, problems + [located(recipe, p) for p in [*(q for q in error.listed() if q.path), *keyless]]


def _packing() -> str | None:
    """The precision that frozen layers may be given to make room, where its package is there."""
    return None if missing_packages(("nf4",)) else "nf4"


def _precision(recipe: Recipe, arguments: Any) -> torch.dtype | None:
    if arguments.fp16 or recipe.values.get("fp16"):
        return torch.float16
    by_default = recipe.row.trl and "bf16" not in recipe.values
    return torch.bfloat16 if arguments.bf16 or recipe.values.get("bf16") or by_default else None
