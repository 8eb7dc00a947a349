"""Text, or turns of a conversation: the two ways in which prompts and answers stand in rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerpeft.recipe.rows import SPEAKERS, TURNS, Unfit, keys_of_turn
from layerpeft.recipe.tasks import cell

Turns = list[dict[str, Any]]


def said(name: str, value: Any) -> str | Turns:
    """A cell as its text, or as turns with `role` and `content`; one turn is a list of one. Raises: Unfit naming the turn."""
    found = cell.parsed(value)
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list) or (isinstance(value, str) and not _is_turn(found)):
        return cell.text(name, value)
    if not found:
        raise Unfit(f"has {name} that are empty")
    return [_turn(name, number, turn) for number, turn in enumerate(found, 1)]


def _is_turn(found: list[Any]) -> bool:
    return bool(found) and isinstance(found[0], dict) and bool({"role", "from"} & set(found[0]))


def _turn(name: str, number: int, turn: Any) -> dict[str, Any]:
    who, text = keys_of_turn(name, number, turn)
    rest = {key: value for key, value in turn.items() if key not in (who, text) and value is not None}
    return {"role": SPEAKERS.get(turn[who], turn[who]), "content": turn.get(text) or "", **rest}


def prompt_of(cells: Mapping[str, Any]) -> str | Turns | None:
    """What is asked: `prompt`, a conversation, `user` with or without `system`, or Alpaca's `instruction` with or without `input`;
    None where a row has none of them."""
    if "user" in cells:
        parts = [(role, cells.get(role)) for role in ("system", "user")]
        return [{"role": role, "content": cell.text(role, text)} for role, text in parts if text is not None]
    name = next((name for name in ("prompt", *TURNS) if name in cells), None)
    if name is None and "instruction" in cells:
        parts = [cell.text(each, cells[each]) for each in ("instruction", "input") if cells.get(each) is not None]
        return "".join(f"{part}\n\n" for part in parts if part.strip())
    return None if name is None else said(name, cells[name])


def answer(given: str | Turns) -> Turns:
    """An answer as turns."""
    return [{"role": "assistant", "content": given}] if isinstance(given, str) else given


def question(given: str | Turns) -> Turns:
    """A prompt as turns."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def asked(name: str, turns: Turns) -> tuple[Turns, Turns]:
    """A conversation as what was asked and its last answer. Raises: Unfit where the assistant does not have the last word."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise Unfit(f"has {name} that do not end with an answer of the assistant")
    return turns[:-1], turns[-1:]
