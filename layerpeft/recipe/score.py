"""`layerpeft score`: the layers of a recipe's model, scored without training."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from layerpeft.errors import RecipeError
from layerpeft.recipe.comparing.arms import AMONG, arms_beside, choosable
from layerpeft.recipe.recipe import Recipe, command_of, is_compared
from layerpeft.recipe.shorter import KEY, chosen_on, shortened_apart
from layerpeft.recipe.surroundings import SCORED, refuse_strangers
from layerpeft.recipe.train import Say
from layerpeft.recipe.trainer import batches_for, load_model, prepare, tokenized
from layerpeft.saving.owned import room, vouch
from layerpeft.selection import plugins
from layerpeft.selection.choose import choose_among
from layerpeft.selection.drop import measures, parse_drop
from layerpeft.selection.select import PICKS, Select, Selection
from layerpeft.selection.typecheck import settings_of
from layerpeft.text import grid, is_first, note
from layerpeft.training.pictures import write_csv, write_png
from layerpeft.training.report import Row


def score(recipe: Recipe, say: Say = print) -> Selection:
    """Scores the layers of a recipe's model as training would; writes scores.json, scores.csv and scores.png.

    Where those that train are chosen by place, and what is dropped by scores, these are scored: on the whole model.
    Raises: LayerpeftError; RecipeError when the recipe chooses by place, which needs no scores."""
    select = recipe.config.choosing
    by_place = select.by == "depth" and select.keep is None
    drops = by_place and recipe[KEY] is not None and measures(parse_drop(recipe[KEY]))
    if by_place and not drops:
        example = command_of(recipe, {"layerpeft.select": {"by": "gradient_norm", "keep": "25%"}}, "score")
        raise RecipeError(f"select: {recipe.select!r} chooses by place, so there is nothing to score; try\n  {example}")
    refuse_strangers(recipe.output_dir, SCORED)
    found = None
    with contextlib.redirect_stdout(sys.stderr):
        setup = tokenized(prepare(recipe))
        if drops:
            selection = chosen_on(setup)[1]
        else:
            with shortened_apart(setup) as setup:
                note(f"loading the model {recipe['model_name_or_path']}")
                model = load_model(setup)
                batches, _ = batches_for(setup, model, recipe.select)
                found = setup.recipe.config.examine(model)
                selection = choose_among(model, select, found.layers, found.targets, batches, costs=found.costs)
    if is_first():
        arms = (
            arms_beside(selection.layers, choosable(recipe, found if recipe[KEY] is None else None))
            if not drops and is_compared(recipe)
            else ""
        )
        _write_scores(recipe, selection, KEY if drops else "layerpeft.select", arms, say)
    return selection


def _write_scores(recipe: Recipe, selection: Selection, key: str, arms: str, say: Say) -> None:
    """`arms`: to compare the choice with; empty where there is nothing."""
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
        [(scores.unit, "name", scores.by, "goes" if key == KEY else "chosen"), *rows],
        "><><",
        (len(scores.unit), max(map(len, names)), 13, 6),
    ):
        say(line)
    say(selection.why)
    say(f"\nwritten: {folder / 'scores.json'}, scores.csv" + (", scores.png" if drawn else ""))
    said = _of_drop(selection) if key == KEY else _of_choice(recipe.config.choosing)
    select = {"by": str(folder / "scores.json"), **said}
    say("\nnext:")
    say(f"  {command_of(recipe, {'output_dir': f'{folder}-by-scores', key: select})}")
    if arms:
        say(f"  {command_of(recipe, verb='compare')} --arms {arms}")


def _of_drop(selection: Selection) -> dict[str, Any]:
    """What says again, with scores, which layers are dropped."""
    return {k: v for k in ("keep", "unit", "within", "layers", "exclude") if (v := selection.select.get(k)) is not None}


def _of_choice(select: Select) -> dict[str, Any]:
    """What a choice says besides of its scores, and of when it is made again: candidates, how many, and the rule."""
    usual, fixed = Select(), not select.is_scheduled
    names = ("keep", "per", "epochs", *AMONG, "within", "seed", *("pick",) * fixed)
    said = {k: v for k in names if (v := getattr(select, k)) != getattr(usual, k)}
    rule = settings_of(plugins.get(PICKS, select.rule).Options) if fixed else {}
    return said | {k: v for k, v in select.options.items() if k in rule}
