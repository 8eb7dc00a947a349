"""The arms of a comparison: other layers, other methods by the recipes that ship, other recipe files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, Problems, RecipeError, unknown
from layerpeft.integrations.files import read_text
from layerpeft.integrations.places import expanded, missing
from layerpeft.recipe.comparing.names import OURS
from layerpeft.recipe.foreign import RENAMED
from layerpeft.recipe.read import MOST, examine
from layerpeft.recipe.recipe import Recipe, settings_of
from layerpeft.recipe.shipped import beside, recipes
from layerpeft.recipe.yaml import Document, parse
from layerpeft.selection import plugins
from layerpeft.selection.choose import candidates
from layerpeft.selection.examined import Examined
from layerpeft.selection.select import SCORERS, Select
from layerpeft.text import note

MOST_RUNS = 9_999  # draws, and layers, that an arm may ask for
PLACES = ("random", "last", "first", "all")
AMONG = ("layers", "exclude", "stack", "unit")  # what `select` says of the candidates
# what an arm has of its own besides its block; model, rows, steps and their schedule are those of the recipe that is compared
OWN = (
    "learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip
TAKEN = {OURS: f"{OURS!r} is the recipe that is compared", "random": "'random' are draws of layers"}
OTHER_MODEL = {"drop": "takes layers out of the model", "exits": "trains a model for every exit"}


@dataclass(frozen=True)
class Arm:
    """What is compared with: a choice by its kind (for `random` the number of draws, for others that of the layers, where one is
    named), or the `source` of another recipe, a file or the name of one that ships."""

    kind: str
    draws: int = 1
    keep: int | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        """As its runs are called; random draws are numbered besides."""
        return self.kind if self.keep is None else f"{self.kind}:{self.keep}"

    @property
    def scores(self) -> bool:
        """Whether it is another criterion."""
        return self.source is None and self.kind not in PLACES


def parse_arms(text: str, draws: int = 3) -> tuple[Arm, ...]:
    """The arms in "random:3,last,lisa,other.yaml"; `random` alone draws `draws` times. A word that stands for several is first a
    place, then a criterion, then a recipe that ships. Raises: RecipeError naming every problem."""
    problems = Problems("--arms")
    found: list[Arm] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        arm = _arm(part, draws, problems)
        if arm is not None and arm.name in [other.name for other in found]:
            problems.add(f"{arm.name!r} is named twice")
        elif arm is not None:
            found.append(arm)
    if not found and not problems.items:
        problems.add(f"no arm is named; there are {', '.join(PLACES)}, criteria, and recipes (layerpeft recipes)")
    problems.raise_if_any(RecipeError)
    return tuple(found)


def _arm(part: str, draws: int, problems: Problems) -> Arm | None:
    if part.endswith((".yaml", ".yml")) or "/" in part:
        if not expanded(part).is_file():
            problems.add(missing("recipe file", part))
            return None
        stem = Path(part).stem
        if stem == "recipe":  # as every run calls its own
            stem = expanded(part).absolute().parent.name
        if ":" in stem or stem in TAKEN:
            taken = TAKEN.get(stem, "in such names a colon stands for draws and layers")
            problems.add(f"{part!r}: an arm is called as its file, and {taken}; name it otherwise")
            return None
        return Arm(stem, source=part)
    kind, colon, number = part.partition(":")
    criteria = [name for name in plugins.names(SCORERS) if name not in ("depth", *PLACES)]
    if kind not in (*PLACES, *criteria, *recipes()):
        problems.add(unknown("arm", kind, (*PLACES, *criteria, *recipes())))
    elif colon and (kind not in (*PLACES, *criteria) or kind == "all" or not re.fullmatch(r"[1-9][0-9]{0,3}", number)):
        sentence = (
            "takes no number"
            if kind not in (*PLACES, *criteria) or kind == "all"
            else f"has no whole number from 1 to {MOST_RUNS:,}"
        )
        problems.add(f"{part!r}: {kind} {sentence} (random:3 draws three times, last:3 trains three layers)")
    elif kind == "random":
        return Arm(kind, int(number or draws))
    elif kind in PLACES or kind in criteria:
        return Arm(kind, keep=int(number) if colon else None)
    else:
        return Arm(kind, source=kind)
    return None


def arm_recipes(recipe: Recipe, arms: Sequence[Arm]) -> dict[str, Recipe]:
    """The recipe as each arm has it that is another recipe or another criterion, by name; nothing is loaded.

    Raises: RecipeError with every problem of all of them.
    """
    problems = Problems("--arms")
    found: dict[str, Recipe] = {}
    for arm in arms:
        if arm.source is None and not arm.scores:
            continue
        try:
            changed = _by_criterion(recipe, arm) if arm.source is None else _of_source(arm.source, recipe.trainer)
        except LayerpeftError as error:
            for problem in error.problems:
                problems.add(f"{arm.name}: {problem.text}")
            continue
        seen = examine(recipe.source, [*recipe.settings, *settings_of(changed)], "compare")
        for fault in seen.problems:
            problems.add(f"{arm.name}: {fault.text}")
        found[arm.name] = seen.recipe
    problems.raise_if_any(RecipeError)
    return found


def among_of(select: Select) -> dict[str, Any]:
    """What a choice says of its candidates."""
    found = {k: v for k in AMONG if (v := getattr(select, k)) is not None}
    if (
        select.by == "depth" and select.keep is None
    ):  # the grammar is the choice itself: others are made of the whole stack
        found.pop("layers", None)
    return found


def choosable(recipe: Recipe, examined: Examined | None = None) -> list[int] | None:
    """The layers among which arms are chosen; None where that is not told beforehand: of parts or kinds of layers, of layers that
    change while training. `examined`: what its config found in the model already; without it the empty one is looked at."""
    select = recipe.config.choosing
    if recipe.model is None or select.unit != "layer" or select.within is not None or select.is_scheduled:
        return None
    found = recipe.config.examine(recipe.model) if examined is None else examined
    return candidates(Select(**among_of(select)), found.layers, found.targets)


def arms_beside(layers: Sequence[int], among: Sequence[int] | None) -> str:
    """What a choice of layers among these is compared with, as `--arms` has it: nothing that is the choice itself, no more draws
    than there are choices, and nothing at all where it is all of them."""
    if among is None:
        return "random:3,last,all"
    chosen, every = sorted(layers), sorted(among)
    if chosen == every:
        return ""
    draws = max(1, min(3, math.comb(len(every), len(chosen))))
    return ",".join([f"random:{draws}", *["last"] * (chosen != every[-len(chosen) :]), "all"])


def _by_criterion(recipe: Recipe, arm: Arm) -> dict[str, Any]:
    return {"layerpeft.select": {**among_of(recipe.config.choosing), "by": arm.kind, "keep": arm.keep or 1}}


def _of_source(source: str, trainer: str) -> dict[str, Any]:
    """What an arm's recipe says of how it trains, as settings over another. Raises: RecipeError."""
    problems = Problems(source)
    path = recipes().get(source, expanded(source))
    try:
        document = parse(read_text(path, MOST))
    except (OSError, ValueError) as error:
        raise RecipeError(f"not a readable text file ({error})") from error
    for fault in document.faults:
        problems.add(str(fault))
    data = {RENAMED.get(key, key): value for key, value in document.data.items()}
    for key in (k for k in OTHER_MODEL if data.get(k) is not None):
        problems.add(f"{key}: {OTHER_MODEL[key]}, which an arm cannot; compare it as a recipe of its own")
    if not document.faults and not isinstance(data.get("layerpeft"), Mapping):
        problems.add("layerpeft: missing; this block says which layers and how")
    problems.raise_if_any(RecipeError)
    if data.get("trainer", trainer) != trainer:
        note(
            f"arm {source}: its recipe is for trainer: {data['trainer']}; it trains by {trainer}, with that method and rate"
        )
    return {"layerpeft": _block(document, path.parent)} | {k: data[k] for k in OWN if k in data}


def _block(document: Document, home: Path) -> dict[str, Any]:
    """The block of a recipe, with scores and runs that its choice names as they are found from here; code is that beside the recipe
    which is compared."""
    block = dict(document.data["layerpeft"])
    if isinstance(select := block.get("select"), Mapping):
        named = {k: v for k in ("by", "of") if isinstance(v := select.get(k), str) and not v.endswith(".py")}
        block["select"] = {**select, **{k: beside(v, home) for k, v in named.items()}}
    return block
