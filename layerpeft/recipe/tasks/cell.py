"""One cell as the text, the list or the file that it is. Each raises Unfit with what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from layerpeft.recipe.reading import plain, text_of
from layerpeft.recipe.rows import Unfit


def text(name: str, value: Any, empty: bool = True) -> str:
    """A text; `empty`: it may be blank."""
    if value is None or (not empty and isinstance(value, str) and not value.strip()):
        raise Unfit(f"has no {name}")
    if isinstance(value, dict | list | tuple):
        kind = "an object" if isinstance(value, dict) else "a list"
        raise Unfit(
            f'has a {name} that is {kind}, not text; to train on it as JSON: columns: {{{name}: " {{{name}}}"}}'
        )
    try:
        found = text_of(value)
        found.encode()
    except UnicodeEncodeError as error:
        raise Unfit(f"has half of a character ({found[error.start]!r}) in its {name}") from None
    except ValueError as error:
        raise Unfit(f"has no text for {name}: {error}") from None
    return found


def parsed(value: Any) -> Any:
    """A cell with its numbers as numbers; of a table, whose cells are text, what a list or an object in it says."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return plain(value) if isinstance(value, str) or not hasattr(value, "tolist") else value.tolist()


def listed(name: str, value: Any) -> list[Any]:
    """A list; a text is one of words, between blanks."""
    found = parsed(value)
    if found is None:
        raise Unfit(f"has no {name}")
    if isinstance(found, str):
        return found.split()
    if not isinstance(found, list):
        raise Unfit(f"has {name} that are {'an object' if isinstance(found, dict) else repr(found)}, not a list")
    return found
