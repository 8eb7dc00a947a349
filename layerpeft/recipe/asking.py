"""What `layerpeft init` asks in a terminal: again and again, until an answer is one; what is wrong with it is said in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from layerpeft.errors import LayerpeftError, UsageError
from layerpeft.integrations.places import expanded
from layerpeft.recipe.init import (
    NONE,
    Wanted,
    check_held_out,
    check_model,
    check_out,
    check_task,
    flags,
    guess,
    look,
    unread,
    usual_share,
)
from layerpeft.recipe.keys import present
from layerpeft.text import on_screen


def asked(given: Wanted, out: bool) -> Wanted:
    """What was not said, from whoever sits at the terminal; an empty answer takes what stands in brackets. `out`: ask where to.

    Raises: UsageError with all that is wrong with what was said, before the first question; and where no answer comes."""
    extra = flags(given, where=not out)
    model = given.model or _ask("Model (a folder, or a name on the hub)", "", check_model)
    data = given.data or _ask(
        "Rows (a file, a folder, or a name on the hub)", "", lambda a: look(a, extra.get("sample_by"))
    )
    given, source = replace(given, model=model, data=data), look(data, extra.get("sample_by"))
    if given.task is None:
        usual = guess(list(extra.get("columns") or source.columns))
        if usual is None:
            raise UsageError(f"init: {unread(source.columns)}")
        task = _ask(
            f"Task ({', '.join(present())})", usual, lambda a: check_task(replace(given, task=a), source, extra)
        )
        given = replace(given, task=task)
    if given.held_out is None and "eval_dataset" not in extra:
        usual = usual_share(len(source)) or NONE
        share = _ask(f"Held-out rows, a share of the rows, or {NONE}", usual, check_held_out)
        given = replace(given, held_out=share)
    return replace(given, out=_ask("Recipe", _free(given.out), check_out)) if out else given


def _ask(what: str, usual: str, check: Callable[[str], Any]) -> str:
    """The first answer that nothing is wrong with. Raises: UsageError where there is none."""
    while True:
        try:
            found = input(on_screen(f"{what}{f' [{usual}]' if usual else ''}: ", sys.stdout)).strip() or usual
        except EOFError:
            raise UsageError(f"init: no answer to: {what}") from None
        try:
            if not found:
                raise UsageError("an answer is needed (Ctrl-C ends this)")
            check(found)
        except LayerpeftError as error:
            print(on_screen(f"  {error}", sys.stdout))
        else:
            return found


def _free(name: str) -> str:
    """The name, or with a number the first that nothing has."""
    path, number, found = expanded(name), 1, name
    while expanded(found).exists():
        number += 1
        found = str(path.with_stem(f"{path.stem}-{number}"))
    return found
