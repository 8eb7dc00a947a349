"""A recipe's choice of layers and targets, tried on the model's architecture before any weight is loaded."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import nn

from layerpeft.errors import MOST, ConfigError, LayerpeftError, Problem, mentions, told
from layerpeft.integrations.peft import BaseTunerLayer
from layerpeft.model.layers import LayerMap, Stacks, base_of, stacks_of
from layerpeft.model.patterns import check_patterns
from layerpeft.model.targets import like
from layerpeft.model.units import in_units
from layerpeft.recipe.recipe import Recipe, layer_config
from layerpeft.recipe.trainers.table import row_of
from layerpeft.selection import plugins
from layerpeft.selection.choose import candidates, lowest
from layerpeft.selection.grammar import layer_numbers
from layerpeft.selection.scores import Scores
from layerpeft.selection.scoring import needs_batches
from layerpeft.selection.select import SCORERS, Select
from layerpeft.tuners.assume import fixed
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.precision import asked
from layerpeft.tuners.stock import unmatched

BLOCK = "layerpeft"
NAMES = (
    "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
    "trainable_token_indices",
)  # fmt: skip


def choice_problems(recipe: Recipe) -> list[Problem]:
    """What of the recipe's layers and targets does not go together on its model without weights, and the keys that say it."""
    config, model = layer_config(recipe), recipe.model
    try:
        check_patterns(config, (name for name, _ in model.named_modules()))
    except LayerpeftError as error:
        return _of_names(error, "target_modules")
    stacks = stacks_of(model)
    plain = config.choosing.is_all and not config.works_by.in_place
    found = _plain_targets(recipe, model) if plain else _against(config, model, stacks, recipe.trainer)
    return found or _dry_run(recipe, config, model, stacks)


def unfit(select: Select, trainer: str) -> str | None:
    """What is wrong with a scorer that needs of rows what a recipe's trainer does not give: their order, or their classes."""
    if not isinstance(select.by, str) or not needs_batches(select):
        return None
    traits = plugins.traits(SCORERS, select.by)
    wrong = "goes by the order of rows, which a recipe's trainer shuffles" if traits.ordered else None
    if traits.classes and not row_of(trainer).one_class:
        wrong = f"needs a class for every row (`classes` in batches), which trainer: {trainer} does not read"
    return wrong and (
        f"by: {select.by} {wrong}; score them beforehand "
        f"(score_layers(model, by='{select.by}', batches=…).save('scores.json')) and write by: scores.json"
    )


def _against(config: LayerLoraConfig, model: nn.Module, stacks: Stacks, trainer: str) -> list[Problem]:
    select = config.choosing
    try:
        layers = stacks.layers(select.stack)
    except LayerpeftError as error:
        return _at(error, "select", *(("stack",) if select.stack else ()))
    found: list[Problem] = []
    if sentence := unfit(select, trainer):
        found.append(Problem((BLOCK, "select", "by"), sentence))
    targets, wrong = _named(config, model, layers)
    if select.unit != "layer" and not wrong:
        try:
            layers, targets = in_units(layers, select.unit, targets)
        except LayerpeftError as error:
            return _at(error, "select", "unit")
    for name in ("layers", "exclude"):
        value = getattr(select, name)
        if value is not None and (select.unit == layers.unit):
            grammar = partial(layer_numbers, value, len(layers), name, layers.unit)
            found += _tried(grammar, "select", name)
    if isinstance(select.by, Scores) and select.unit == layers.unit:
        found += _tried(partial(select.by.check, layers), "select", "by")
    if (
        wrong and config.target_modules is None and not config.works_by.in_place
    ):  # PEFT may have no default; what else is wrong?
        more = _named(config.changed(target_modules="all-linear"), model, layers)[1]
        wrong += [problem for problem in more if problem not in wrong]
    found += wrong
    certain = not any(problem.path[-1] in ("layers", "exclude") for problem in found)
    found += _tried(
        lambda: lowest(select, layers, candidates(select, layers, targets) if certain else range(len(layers))),
        "select",
        "keep",
    )
    return found


def _named(config: LayerLoraConfig, model: nn.Module, layers: LayerMap) -> tuple[Any, list[Problem]]:
    """The targets that are meant (all there are, where that is wrong), and what is wrong with how they are named."""
    try:
        return config.targets_in(model, layers), []
    except LayerpeftError as error:
        return layers.targets, _of_names(error, "target_modules")


def _plain_targets(recipe: Recipe, model: nn.Module) -> list[Problem]:
    """Names that match no module; PEFT itself is content when one of several matches."""
    names = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    found: list[Problem] = []
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        given: Any = recipe.block.get(key)
        among = parameters if key == "target_parameters" else names
        what = "parameter" if key == "target_parameters" else "module"
        regex = isinstance(given, str) and key == "exclude_modules"
        for wanted in [given] if regex else given if isinstance(given, list) else ():
            hits = (re.fullmatch(wanted, n) if regex else n == wanted or n.endswith(f".{wanted}") for n in among)
            if len(found) < MOST and not any(hits):
                sentence = f"{key}: '{wanted}' matches no {what} of the model. {like(wanted, among)}"
                found.append(Problem((BLOCK, key), sentence))
    return found + _of_names(ConfigError(*unmatched(layer_config(recipe), model, names)), BLOCK)


def _dry_run(recipe: Recipe, config: LayerLoraConfig, model: nn.Module, stacks: Stacks) -> list[Problem]:
    """Wraps a copy of the empty model: what PEFT and TRL refuse comes out here."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real run says it again
            resolved = fixed(config, model, stacks)
            if config.quantizes:
                asked(config, model, resolved.layers, known=False, stacks=stacks)
            wrapped: Any = peft.get_peft_model(copy.deepcopy(model), resolved.config)  # type: ignore[arg-type]
    except LayerpeftError as error:
        if any(p.path[:1] and p.path[0] in NAMES for p in error.problems):
            return _of_names(error, BLOCK)
        return [Problem((BLOCK, *p.path), f"{BLOCK}: {p.text}") for p in error.listed()]
    except (ValueError, TypeError) as error:
        named = [k for k in recipe.block if mentions(error, k)]
        named += ["target_modules"] if mentions(error, "Target module", word=False) else []
        return [Problem((BLOCK, *named[:1]), f"{(*named, BLOCK)[0]}: {told(error, 400)}")]
    except Exception:
        return []  # something that cannot be done without weights; whether it is wrong shows with them
    if config.works_by.in_place:  # a head trains in place there, and whoever reads its weight reads what was trained
        return []
    if config.choosing.by == "depth":  # what trains is known
        tuner: Any = wrapped.base_model
        trained = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
        if wrong := unmatched(config, model, trained):
            return _of_names(ConfigError(*wrong), BLOCK)
    head = base_of(wrapped).get_output_embeddings() if recipe.row.fused_head else None  # type: ignore[operator]
    if isinstance(head, BaseTunerLayer):
        sentence = (
            "the output embeddings (lm_head) are among the modules, and TRL's loss reads their weight past any adapter; leave "
            "them out, or train them whole (modules_to_save)"
        )
        return [Problem((BLOCK, "target_modules"), f"target_modules: {sentence}")]
    return []


def _tried(call: Callable[[], Any], *path: str) -> list[Problem]:
    try:
        call()
    except LayerpeftError as error:
        return _at(error, *path)
    return []


def _at(error: LayerpeftError, *path: str) -> list[Problem]:
    """The problems of an error at a key of the block; a sentence names its key where the problem has one of its own."""
    return [Problem((BLOCK, *path), p.text if p.path else f"{path[-1]}: {p.text}") for p in error.listed()]


def _of_names(error: LayerpeftError, key: str) -> list[Problem]:
    """What is wrong with names of modules, each with the key that it stands at; `key`, where a sentence is of none."""
    keys = [(p.path[-1] if p.path else key, p.text) for p in error.problems]
    return [Problem((BLOCK, key), f"{key}: {text}") for key, text in keys]
