"""A recipe: one YAML file that says what to train. What is wrong in it is found here, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerpeft.errors import Problem, Problems, RecipeError
from layerpeft.integrations.files import read_text
from layerpeft.recipe.check import Check
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.shipped import find_recipe
from layerpeft.recipe.yaml import COMMAND, Fault, override, parse

MOST = 4 << 20  # bytes of a recipe


@dataclass(frozen=True)
class Examined:
    """A recipe as far as it could be read, what is wrong with it, and the top-level keys that something is wrong with."""

    recipe: Recipe
    problems: tuple[Fault, ...]
    wrong: frozenset[str]

    def sound(self, also: Sequence[Fault] = ()) -> Recipe:
        """The recipe. Raises: RecipeError with every problem, and with those that were found `also`."""
        problems = Problems(f"recipe {self.recipe.source}")
        for fault in sorted(dict.fromkeys([*self.problems, *also]), key=_order):
            problems.add(str(fault), *fault.path)
        problems.raise_if_any(RecipeError)
        return self.recipe


def load_recipe(source: str, settings: Sequence[str] = (), purpose: str = "train") -> Recipe:
    """Reads a recipe (a path, or the name of a shipped one) with `key=value` settings laid over it.

    `purpose`: "train", "plan", "preview", "score", "compare" or "prefill", which ask for different things of rows and folders.
    Raises: RecipeError that lists every problem with its line.
    """
    return examine(source, settings, purpose).sound()


def examine(source: str, settings: Sequence[str] = (), purpose: str = "train", accelerator: bool = False) -> Examined:
    """A recipe and everything wrong with it; `accelerator`: it is to run on one, whatever is here.
    Raises: RecipeError when there is no such file."""
    path = find_recipe(source)
    try:
        text = read_text(path, MOST)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source}: not a readable text file ({error})") from error
    check = Check(override(parse(text), settings), purpose, accelerator)
    recipe = replace(check.run(source, path), settings=tuple(settings))
    return Examined(recipe, tuple(check.found), frozenset(check.wrong))


def _order(fault: Fault) -> tuple[int, int]:
    """Where a fault belongs: lines of the file, then the command line, then what has no place."""
    return (2, 0) if fault.line is None else (fault.line == COMMAND, fault.line)


def located(recipe: Recipe, problem: Problem) -> Fault:
    """A problem of a top-level key at its line."""
    return Fault(recipe.lines.get(problem.path[0]), problem.text, problem.path)
