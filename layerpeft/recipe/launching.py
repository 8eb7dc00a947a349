"""One process or several: a line for who runs one beside several accelerators, and the refusal of what runs in one alone."""

from __future__ import annotations

import shlex

import torch

from layerpeft.errors import ElsewhereError, RecipeError
from layerpeft.integrations.distributed import rank, world_size
from layerpeft.recipe.recipe import Recipe, command_of, training_arguments
from layerpeft.recipe.shipped import launch_files
from layerpeft.text import note


def suggest_launch(recipe: Recipe) -> None:
    """Says the command that uses all accelerators that are here, where this process is alone."""
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count < 2 or world_size() > 1 or training_arguments(recipe).use_cpu:
        return
    note(f"{count} accelerators are here, and one process runs; one for each: {launched(recipe, count)}")


def refuse_several(command: str, instead: str = "") -> None:
    """Raises: RecipeError in several processes, of a command that runs in one, with what to do `instead`; in all but the first of
    them ElsewhereError."""
    if (count := world_size()) < 2:
        return
    if rank() > 0:
        raise ElsewhereError()
    more = f"; {instead}" if instead else ""
    raise RecipeError(
        f"{command} runs in one process, and there are {count}: start it without accelerate launch or torchrun{more}"
    )


def launched(recipe: Recipe, count: int, engine: str = "ddp") -> str:
    """The command that trains a recipe in so many processes, to paste into a shell."""
    file = launch_files()[f"accelerate/{engine}"]
    start = ["accelerate", "launch", "--config_file", str(file), "--num_processes", str(count), "-m"]
    return f"{shlex.join(start)} {command_of(recipe)}"
