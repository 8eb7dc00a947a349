"""`layerpeft compare` on a recipe: is the choice of layers worth anything against random and last layers at the same budget?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from benchmarks.case import Case
from layerpeft.errors import Problems, unknown
from layerpeft.recipe.compare import compare
from layerpeft.recipe.comparing.arms import parse_arms
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import to_yaml
from layerpeft.recipe.shipped import recipes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """A shipped recipe, and the arms as the command line takes them."""

    recipe: str
    compare_with: str = "random:3,last,all"
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    if options.recipe not in recipes():
        problems.add(f"recipe: {unknown('recipe', options.recipe, recipes())}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """What `layerpeft compare` writes."""
    options: Options = case.options
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        recipe = load_recipe(options.recipe, (), "compare")
        found = compare(recipe, parse_arms(options.compare_with), say)
        return {**found.to_dict(), "recipe": to_yaml(recipe)}


def tables(result: Mapping[str, Any]) -> str:
    """One line per run, and the verdict."""
    lines = [
        [run["arm"], ", ".join(map(str, run["layers"])), table.number_text(run["trainable"]), f"{run['value']:.3f}"]
        for run in result["runs"]
    ]
    head = ["arm", "layers", "trains", f"{result['measure']} ({result['before']:.3f} before)"]
    return f"{table.markdown(head, lines)}\n\n{result['verdict']['sentence']}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw: `layerpeft compare` draws its own picture."""
