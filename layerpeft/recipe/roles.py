"""Who speaks in turns: the names that a chat template writes, and those that are misspelt, by which it would write all the same."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from layerpeft.errors import Problem, RecipeError, nearest
from layerpeft.recipe.rows import SHOWN, SPEAKERS, TURNS, Source

# as templates call them; any other that a template has a case for goes, too
ROLES = ("system", "user", "assistant", "tool", "developer", "ipython", "function", "observation", "model")
OF_OTHERS = {**SPEAKERS, "chatgpt": "assistant", "bot": "assistant", "ai": "assistant"}
COLUMNS = (*TURNS, "prompt", "completion", "chosen", "rejected")
MARK = "layerpeft0mark"  # what no template has in it


def check(part: Any, source: Source, template: Any, key: str, step: int = 1) -> None:
    """Whether everybody who speaks is known to the chat template of a tokenizer or processor, or to all of them.

    `part`: every `step`-th row of those of `source`. Raises: RecipeError naming the first row of each speaker who is not."""
    first = part[0] if len(part) else {}
    names = [name for name in COLUMNS if isinstance(first.get(name), list)]
    if not names:
        return
    wrong: dict[str, str] = {}
    begun: dict[str, tuple[int, str, int]] = {}
    times: Counter[str] = Counter()
    for index, row in enumerate(part.select_columns(names)):
        for name in names:
            for number, turn in enumerate(row[name] or (), 1):
                role = str(turn["role"])
                if role not in wrong:
                    wrong[role] = _wrong(role, template)
                if wrong[role]:
                    times[role] += 1
                    begun.setdefault(role, (index * step, name, number))
    if times:
        lines = [_line(role, begun[role], times[role], wrong[role], source) for role in list(times)[:SHOWN]]
        raise RecipeError(*(Problem((key,), f"{key}: {line}") for line in lines))


def _line(role: str, begun: tuple[int, str, int], times: int, wrong: str, source: Source) -> str:
    index, name, number = begun
    place = source.place(index)
    more = f" ({times} turns in all)" if times > 1 else ""
    return f"{place.where}: row {place.number} has a turn ({name}, number {number}) of {role!r}{wrong}{more}"


def _wrong(role: str, template: Any) -> str:
    """What is wrong with a name, to stand behind it; nothing where nothing is."""
    text = getattr(template, "chat_template", None)
    text = "\n".join(text.values()) if isinstance(text, dict) else text
    cases = set(re.findall(r"""['"]([\w-]+)['"]""", text or ""))
    if role in cases:
        return ""
    close = nearest(role.lower(), (*ROLES, *OF_OTHERS)) or ""
    close = OF_OTHERS.get(close, close) if close not in ROLES else close
    if role not in ROLES and close:
        return f". Did you mean {close!r}?"
    if text is None and role in ROLES or text is not None and _writes(role, template):
        return ""
    known = [name for name in ROLES if name in cases] or ROLES
    return f", of whom the chat template writes nothing; there are {', '.join(known)}"


def _writes(role: str, template: Any) -> bool:
    """Whether the template writes what somebody says whom it has no case for; taken for granted where it cannot be asked."""
    turns = [{"role": "user", "content": "a"}, {"role": role, "content": MARK}]
    try:
        return MARK in template.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates raise what they like, and do so again over the row itself, which is named then
        return True
