"""Templates of `columns`: what they name, what they make of a row, and how each door has them said."""

from __future__ import annotations

import json
import re
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerpeft.recipe.reading import text_of

Say = Callable[[Mapping[str, str]], str]
EXAMPLE: Mapping[str, str] = {"prompt": "{question}\n", "completion": "{answer}"}
ANSWERS = ("completion", "assistant", "chosen", "rejected", "answer", "positive", "target", "label", "tags")
LONGEST = 40  # of a name that an example takes up


def template_columns(template: str) -> list[str]:
    """The columns that a template such as "Question: {question}" names.
    Raises: ValueError with a readable sentence."""
    return [name for _, name, _, _ in pieces_of(template) if name is not None]


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's values, as they were written, in place of `{column}`; an empty cell (None) is empty text."""
    cells = [(text, None if name is None else row[name]) for text, name, _, _ in pieces_of(template)]
    return "".join(text + ("" if cell is None else text_of(cell)) for text, cell in cells)


def pieces_of(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """As `string.Formatter.parse` has them. Raises: ValueError with a readable sentence."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error} (a brace that is text is written twice: {{{{)") from error
    for _, name, form, change in pieces:
        if name == "" or form or change:
            raise ValueError(f"{template!r}: braces hold the name of a column and nothing else")
    return pieces


# ---- as they are said -----------------------------------------------------------------------------------------------


def suited(templates: Mapping[str, str], have: Sequence[str]) -> dict[str, str]:
    """An example in the names that rows have: the first of them in order, the last for the last answer, whichever template stands
    first. As it is where they have too few, or one that no template can hold."""
    ordered = sorted(templates, key=lambda name: name in ANSWERS)
    named = list(dict.fromkeys(name for key in ordered for name in template_columns(templates[key])))
    taken = [*have[: len(named) - 1], have[-1]] if have else []
    if len(have) < len(named) or any(len(name) > LONGEST or re.search(r"[{}:!]", name) for name in taken):
        return dict(templates)
    own = {f"{{{name}}}": f"{{{other}}}" for name, other in zip(named, taken, strict=True)}
    return {
        key: re.sub(r"\{[^{}]+\}", lambda found: own.get(found[0], found[0]), text) for key, text in templates.items()
    }


def in_yaml(templates: Mapping[str, str]) -> str:
    """As the value of a recipe's `columns`."""
    return f"{{{', '.join(f'{k}: {json.dumps(t, ensure_ascii=False)}' for k, t in templates.items())}}}"


def in_recipe(templates: Mapping[str, str]) -> str:
    """As a line of a recipe."""
    return f"columns: {in_yaml(templates)}"


def as_setting(templates: Mapping[str, str]) -> str:
    """As a word of a command that takes settings, quoted for a shell."""
    return f"columns={shlex.quote(in_yaml(templates))}"


def as_flags(templates: Mapping[str, str]) -> str:
    """As words of a command that reads rows by what was trained, quoted for a shell."""
    return " ".join(f"--column {name}={_quoted(text)}" for name, text in templates.items())


def _quoted(text: str) -> str:
    """For a shell, on one line."""
    if "\n" not in text:
        return shlex.quote(text)
    inside = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{inside}'"
