"""What one card holds and receives at sizes that no one card takes: from plans, by trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.case import Case
from layerpeft.errors import LayerpeftError, Problems
from layerpeft.planning.engines import cards
from layerpeft.planning.plan import for_cards
from layerpeft.planning.share import Share
from layerpeft.recipe.plan import asked
from layerpeft.recipe.recipe import layer_config
from layerpeft.text import size_text

Say = Callable[[str], None]
RECIPE = Path(__file__).parents[1] / "scale" / "recipe.yaml"
NAMES = {
    "cards": "cards", "engine": "engine", "layers": "layers", "weights": "weights", "gradients": "gradients",
    "states": "optimizer", "activations": "activations", "gathered": "whole at once", "buffers": "buffers",
    "together": "**a card**", "forward": "gathered, forward", "backward": "gathered, backward", "reduced": "reduced",
    "received": "**a card receives**",
}  # fmt: skip
PARTS = ("weights", "gradients", "states", "activations", "gathered", "buffers")


@dataclass(frozen=True)
class Options:
    """`models`: folders beside the recipe that hold a shape; `choices` of layers, `engines` and numbers of `cards`."""

    models: Sequence[str]
    choices: Sequence[str]
    engines: Sequence[str]
    cards: Sequence[int]


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    for name in options.models:
        if not (RECIPE.parent / name / "config.json").is_file():
            problems.add(f"models: no {name}/config.json beside {RECIPE.name}")
    for name in options.engines:
        try:
            cards(name, 1)
        except LayerpeftError as error:
            problems.add(f"engines: {error}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """A row for each model, engine, number of cards and choice."""
    options: Options = case.options
    rows = []
    for model in options.models:
        for engine in options.engines:
            for choice in options.choices:
                rows += [row(model, choice, share) for share in counted(model, engine, choice, options.cards)]
            say(f"{model}, {engine}")
    return {"rows": rows}


def counted(model: str, engine: str, choice: str, processes: Sequence[int]) -> list[Share]:
    """As `layerpeft plan` counts for each of these numbers of cards."""
    settings = [f"model_name_or_path={model}", f"layerpeft.select={choice}"]
    recipe, empty, options, _ = asked(str(RECIPE), settings, True, cards(engine, processes[0]))
    return for_cards(empty, layer_config(recipe), processes, **options)


def row(model: str, choice: str, share: Share) -> dict[str, Any]:
    """One line of the table, in bytes."""
    moved = share.traffic
    passed = {"forward": moved.forward.bytes, "backward": moved.backward.bytes, "reduced": moved.reduced.bytes}
    parts = {name: getattr(share, name) for name in PARTS} | {"together": share.together}
    parts["states"] += share.masters
    return {
        "model": model,
        "layers": choice,
        "engine": share.engine,
        "cards": share.processes,
        **parts,
        **passed,
        "received": moved.received,
    }


def tables(result: Mapping[str, Any]) -> str:
    """One table a model."""
    parts = []
    for model in dict.fromkeys(line["model"] for line in result["rows"]):
        lines = [[text(line[key]) for key in NAMES] for line in result["rows"] if line["model"] == model]
        parts.append(f"`{model}`\n\n{table.markdown(list(NAMES.values()), lines)}")
    return "\n\n".join(parts)


def text(value: Any) -> str:
    """A cell: small numbers are cards, large ones bytes."""
    return value if isinstance(value, str) else str(value) if 0 < value < 1000 else size_text(value) if value else "–"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing: the table says it."""
