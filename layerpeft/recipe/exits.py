"""`exits`: a recipe whose loss is the mean over several depths of the model, and the model of each depth."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, Problem
from layerpeft.model.layers import base_of, layer_map
from layerpeft.quantization.save import is_saved
from layerpeft.recipe.model import code, model_path
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.surroundings import refuse_strangers
from layerpeft.recipe.trainer import held_out_numbers
from layerpeft.saving.owned import files_below, put_on_record
from layerpeft.text import note
from layerpeft.training.exits import at_exit, checked_exits, depths_of
from layerpeft.tuners.exits import exit_folder, save_exits

KEY = "exits"
# settings of training with which the loss is another than the one the model computes, or is not computed as it stands
OTHERS: Mapping[str, tuple[Any, str]] = {
    "loss_type": ("dft", "weights each token by its probability, which exits average"),
    "label_smoothing_factor": (None, "is computed from the logits of the last layer alone"),
    "torch_compile": (True, "compiles the model, whose head runs once for every exit"),
    "use_liger_kernel": (True, "puts a forward pass of its own in the place of the model's"),
}


def exit_problems(recipe: Recipe) -> list[Problem]:
    """What of a recipe does not go together with its exits; its model is there by now."""
    if recipe[KEY] is None:
        return []
    found: list[Problem] = []
    try:
        stack = recipe.config.choosing.stack if recipe.config is not None else None
        checked_exits(recipe[KEY], len(layer_map(recipe.model, stack)))
    except LayerpeftError as error:
        found += [Problem((KEY,), p.text) for p in error.problems]
    for key, (value, why) in OTHERS.items():
        given = recipe.values.get(key)
        if given and value in (None, given):
            found.append(Problem((key,), f"{key}: {why}; take it out, or exits"))
    if recipe.values.get("gradient_checkpointing", True) and (
        recipe.values.get("gradient_checkpointing_kwargs") or {}
    ).get("use_reentrant"):
        sentence = "gradient_checkpointing_kwargs: reentrant checkpointing hides what layers give out; write use_reentrant: false"
        found.append(Problem(("gradient_checkpointing_kwargs",), sentence))
    if recipe.config is not None and recipe.config.distill is not None:
        found.append(
            Problem(("layerpeft", "distill"), "distill: a teacher weighs its terms by one loss, and exits have several")
        )
    if is_saved(model_path(recipe)):
        sentence = f"{KEY}: each becomes a plain model, and {model_path(recipe)} is stored in fewer bits; name the one in 16 bit"
        found.append(Problem((KEY,), sentence))
    return found


def exit_numbers(recipe: Recipe, trainer: Any) -> dict[int, dict[str, float]]:
    """The held-out numbers of every exit but the last, which is the model; empty without exits or held-out rows."""
    stack, found = recipe.config.choosing.stack, dict[int, dict[str, float]]()
    for depth in depths_of(trainer.model)[:-1] if trainer.eval_dataset is not None else ():
        with at_exit(trainer.model, depth, stack):
            found[depth] = held_out_numbers(trainer)
    return found


def write_exits(recipe: Recipe, model: Any, folder: Path) -> None:
    """The model of each exit, in a folder of its own beside the saved adapter."""
    depths = depths_of(model)
    if not depths:
        return
    names = [exit_folder(folder, d).name for d in depths]
    refuse_strangers(folder, [file for name in names for file in files_below(folder, name)])
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
    note(f"writing the model of each exit: {', '.join(names)}")
    trusted = {k: v for k, v in code(recipe).items() if v}  # named, even as no, it has the base merged in memory
    save_exits(folder, depths, dtype=getattr(base_of(model), "dtype", None), **trusted)
    put_on_record(folder, [file for name in names for file in files_below(folder, name)])
