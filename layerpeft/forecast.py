"""`layerpeft plan`: what a recipe will cost, before any weight is loaded."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import Any

from layerpeft.errors import RecipeError
from layerpeft.fit import Fit, fit
from layerpeft.plan import STATES, Plan, plan
from layerpeft.recipe import Recipe, layer_config, training_arguments
from layerpeft.training import empty_model, prepare


def forecast(recipe: Recipe, limit: str | None = None) -> Plan | Fit:
    """The plan of a recipe; with `limit` ("24GB"), the largest choice that fits and what it gives up.

    Raises: LayerpeftError, with every problem of the recipe at once; ConfigError where nothing fits.
    """
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet when they are imported
        setup = prepare(recipe)
        model = empty_model(setup)
        arguments = training_arguments(recipe)
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if name not in STATES:
        raise RecipeError(
            f"optim: the states of {name!r} are not known to the plan, only those of {', '.join(sorted(STATES))}"
        )
    options: dict[str, Any] = {
        "batch_size": arguments.per_device_train_batch_size,
        "length": recipe["max_length"] or 1024,
        "optimizer": name,
        "checkpointing": bool(arguments.gradient_checkpointing),
    }
    config = layer_config(recipe, recipe.select, None)
    return plan(model, config, **options) if limit is None else fit(model, config, limit, **options)


def as_data(found: Plan | Fit) -> dict[str, Any]:
    """A plan as plain data."""
    if isinstance(found, Plan):
        return asdict(found) | {"peak_bytes": found.peak_bytes}
    return {
        "plan": as_data(found.plan),
        "gave_up": list(found.gave_up),
        "per_device_train_batch_size": found.batch_size,
        "gradient_checkpointing": found.checkpointing,
        "r": found.config.r,
    }
