"""`layerpeft import`: a recipe out of another tool's file, with what became of each of its keys."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from layerpeft.errors import UsageError
from layerpeft.integrations.places import expanded, missing
from layerpeft.recipe import keys
from layerpeft.recipe.importing.draft import Draft, Given, said
from layerpeft.recipe.importing.rules import translate
from layerpeft.recipe.importing.settle import settle
from layerpeft.recipe.importing.shell import PROGRAM
from layerpeft.recipe.importing.source import read
from layerpeft.recipe.importing.tools import whose
from layerpeft.recipe.written import recipe_text, wrapped

LEFT = "left out, and why:"


@dataclass(frozen=True)
class Imported:
    """A recipe that was written: where, whose the file was, how many of its keys it says, and what it does not, with reasons."""

    path: Path
    tool: str
    mapped: int
    left: tuple[tuple[str, str], ...]


def import_file(
    source: str, out: str = "recipe.yaml", tool: str | None = None, model: str | None = None, force: bool = False
) -> Imported:
    """Writes a recipe that says what the file says. `tool`: whose it is, where its keys do not tell; `model`: the recipe's, by
    whose config layers are counted; `force`: what lies at `out` is written over.

    Raises: UsageError with every problem: what cannot be read, and what decides what trains and cannot be said here.
    """
    path, target = expanded(source), expanded(out)
    draft = drafted(path, target, tool, model)
    if target.exists() and not force:
        raise UsageError(f"--out: {out} exists already; name another file, or write over it (--force)")
    if not target.parent.is_dir():
        raise UsageError(f"--out: {missing('folder', str(target.parent))}")
    text = written(draft, path, target)
    try:
        with target.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"--out: {out} exists already; name another file, or write over it (--force)") from None
    read_ones = [key for key in draft.given.data if key != PROGRAM and key not in draft.empty]
    lost = {shown.partition(":")[0].partition("[")[0].partition(".")[0] for shown, _ in draft.left}
    return Imported(target, draft.tool, sum(key not in lost for key in read_ones), tuple(draft.left))


def drafted(path: Path, target: Path, tool: str | None, model: str | None) -> Draft:
    """What the recipe will say. Raises: UsageError."""
    data = read(path)
    named = whose(data, tool)
    out = Path(os.path.abspath(target.parent))
    draft = Draft(Given(data, path.parent, model, out), named.title)
    named.start(draft)
    translate(draft, named.table)
    known = keys.top_settings(draft.trainer)
    for key, value in named.defaults.items():
        if key not in draft.top and key in known and known[key].default != value:
            draft.put(key, value, f"{named.title}'s default")
    settle(draft, path.stem)
    draft.problems.title = f"import {path}"
    draft.problems.raise_if_any(UsageError)
    return draft


def written(draft: Draft, path: Path, target: Path) -> str:
    """The recipe's text."""
    head = [f"imported from {path.name} ({draft.tool}); beside each key: what it comes from there"]
    notes = {key: "; ".join(texts) for key, texts in draft.notes.items() if texts}
    block = {name: draft.block[name] for name in ("method", "select") if name in draft.block} | draft.block
    text = recipe_text(target, {**draft.top, "layerpeft": block}, notes, head, beside=True)
    left = [line for shown, why in draft.left for line in wrapped(f"{shown} -- {why}", indent="  ")]
    if left:
        text += "\n".join(["", f"# {LEFT}", *left, ""])
    unsaid = [key for key in draft.read if key in draft.given.data and not re.search(rf"\b{re.escape(key)}\b", text)]
    if values := {key: draft.given.data[key] for key in sorted(unsaid) if key != PROGRAM and key not in draft.empty}:
        told = ", ".join(said(key, value) for key, value in values.items())
        text += "\n".join(["", *wrapped(f"read with the others: {told}"), ""])
    if draft.empty:
        text += "\n".join(["", *wrapped(f"without a value there: {', '.join(draft.empty)}"), ""])
    return text
