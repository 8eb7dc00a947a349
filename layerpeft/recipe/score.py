"""`layerpeft score`: the layers of a recipe's model, scored without training."""

from __future__ import annotations

import contextlib
import sys

from layerpeft.errors import RecipeError
from layerpeft.recipe.recipe import Recipe, command_of
from layerpeft.recipe.surroundings import SCORED, refuse_strangers
from layerpeft.recipe.train import Say
from layerpeft.recipe.trainer import batches_for, load_model, prepare, tokenized
from layerpeft.saving.owned import room, vouch
from layerpeft.selection.choose import choose_among
from layerpeft.selection.select import Selection
from layerpeft.text import grid, is_first, note
from layerpeft.training.pictures import write_csv, write_png
from layerpeft.training.report import Row


def score(recipe: Recipe, say: Say = print) -> Selection:
    """Scores the layers of a recipe's model as training would; writes scores.json, scores.csv and scores.png.
    Raises: LayerpeftError; RecipeError when the recipe chooses by place, which needs no scores."""
    select = recipe.config.choosing
    if select.by == "depth" and select.keep is None:
        example = command_of(recipe, {"layerpeft.select": {"by": "gradient_norm", "keep": "25%"}}, "score")
        raise RecipeError(f"select: {recipe.select!r} chooses by place, so there is nothing to score; try\n  {example}")
    refuse_strangers(recipe.output_dir, SCORED)
    with contextlib.redirect_stdout(sys.stderr):
        setup = tokenized(prepare(recipe))
        note(f"loading the model {recipe['model_name_or_path']}")
        model = load_model(setup)
        batches, _ = batches_for(setup, model, recipe.select)
        found = recipe.config.examine(model)
        selection = choose_among(model, select, found.layers, found.targets, batches, costs=found.costs)
    if is_first():
        _write_scores(recipe, selection, say)
    return selection


def _write_scores(recipe: Recipe, selection: Selection, say: Say) -> None:
    scores = selection.scores
    assert scores is not None
    folder = room(recipe.output_dir, SCORED)
    folder.mkdir(parents=True, exist_ok=True)
    chosen, names = set(selection.layers), selection.layer_names
    table = [Row(i, names[i], value, i in chosen, None, None) for i, value in enumerate(scores.values)]
    write_csv(table, folder / "scores.csv", scores.unit)
    drawn = write_png(table, folder / "scores.png", f"{scores.by} per {scores.unit}", scores.unit)
    vouch(folder / "scores.json", scores.to_dict(), SCORED[1:])
    rows = [(str(row.layer), row.name, f"{row.score:.6g}", "yes" if row.chosen else "") for row in table]
    for line in grid(
        [(scores.unit, "name", scores.by, "chosen"), *rows], "><><", (len(scores.unit), max(map(len, names)), 13, 6)
    ):
        say(line)
    say(selection.why)
    say(f"\nwritten: {folder / 'scores.json'}, scores.csv" + (", scores.png" if drawn else ""))
    own = {k: v for k, v in recipe.config.choosing.to_dict().items() if k in ("keep", "unit", "within")}
    select = {"by": str(folder / "scores.json"), **own}
    say("\nnext:")
    say(f"  {command_of(recipe, {'output_dir': f'{folder}-by-scores', 'layerpeft.select': select})}")
    say(f"  {command_of(recipe, verb='compare')} --arms random:3,last,all")
