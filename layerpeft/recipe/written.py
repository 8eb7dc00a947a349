"""The text of a recipe: what is trained on what, the layers, then the settings of the trainer, each with what is said of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpeft.recipe import keys
from layerpeft.recipe.preview_text import harmless
from layerpeft.recipe.trainers.table import ROWS
from layerpeft.recipe.yaml import flow

WIDTH = 120


def recipe_text(
    path: Path, values: Mapping[str, Any], notes: Mapping[str, str], head: Sequence[str] = (), beside: bool = False
) -> str:
    """The file, to be written at `path`. `notes`: comments by key (of the block: `layerpeft.key`, or the key alone); `head`: lines
    below the first; `beside`: comments stand behind a key where there is room, else all stand above."""

    def line(key: str, value: Any, before: str = "", note: str | None = None) -> str:
        text = f"{before}{key}: {flow(value)}"
        if len(text) > WIDTH and isinstance(value, list):
            text = "\n".join([f"{before}{key}:", *(f"{before}  - {flow([item])[1:-1]}" for item in value)])
        if not note:
            return f"{text}\n"
        said = f"# {comment(note)}"
        if beside and "\n" not in text and len(text) + len(said) + 2 <= WIDTH:
            return f"{text}  {said}\n"
        above = (
            [f"{before}{part}\n" for part in wrapped(note, WIDTH - len(before))] if beside else [f"{before}{said}\n"]
        )
        return "".join([*above, f"{text}\n"])

    own = [key for key in keys.own_keys() if key in values and key != "layerpeft"]
    rest = [key for key in values if key not in own and key != "layerpeft"]
    name = comment(str(path))
    return "".join([
        f"# layerpeft train {name}\n", *(f"# {comment(text)}\n" for text in head),
        f"# before that: layerpeft plan {name} (what it costs), layerpeft preview {name} (rows as the model sees them)\n",
        *(line(key, values[key], note=notes.get(key)) for key in own),
        "\nlayerpeft:\n",
        *(line(k, v, "  ", notes.get(f"layerpeft.{k}", notes.get(k))) for k, v in values["layerpeft"].items()),
        f"\n# from here on: settings of the trainer ({ROWS[values['trainer']].arguments})\n",
        *(line(key, values[key], note=notes.get(key)) for key in rest),
    ])  # fmt: skip


def wrapped(text: str, width: int = WIDTH, indent: str = "") -> list[str]:
    """Text as comments of so many columns; what follows the first line stands further in."""
    start = f"# {indent}"
    lines = textwrap.TextWrapper(width, start, f"{start}  ", break_long_words=False, break_on_hyphens=False)
    return lines.wrap(comment(text))


def comment(text: str) -> str:
    """Text as a comment holds it: on one line, and nothing in it that moves a cursor."""
    return " ".join(harmless(text).split())
