"""Rows as other tools name them: where they lie, what their columns are, and what of it a recipe says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerpeft.integrations.places import expanded
from layerpeft.recipe import rows
from layerpeft.recipe.importing.draft import Draft, Given, flag, number, said, whole
from layerpeft.recipe.shipped import SCHEME

TURNS, ALPACA, TEXT, ASKED, PAIRS, LIKED = "conversations", "alpaca", "text", "prompts", "pairs", "likes"
SPLIT = "train"


@dataclass(frozen=True)
class Rows:
    """One data set. `form`: what its rows are, where that is known; `columns`: templates, where names say too little; `told`: what
    it was called there; `notes`: what is to be said of it."""

    path: str | list[str]
    form: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    told: str = ""
    config: str | None = None
    split: str | None = None
    weight: float | None = None
    notes: tuple[str, ...] = ()

    def item(self) -> dict[str, Any]:
        """As one of several in a recipe."""
        found = {"path": self.path, "weight": self.weight, "split": self.split, "config": self.config}
        return {name: value for name, value in found.items() if value is not None}


def place(given: Given, name: str) -> str:
    """A path as the recipe finds it: from here, else beside the recipe; a name on the hub as it is."""
    path = expanded(name)
    if name.startswith(SCHEME) or path.is_absolute() or path.exists() or not (given.home / path).exists():
        return name
    return Path(os.path.relpath(given.home / path, given.out)).as_posix()


def put(draft: Draft, found: Sequence[Rows], key: str = "dataset_name", told: str = "") -> None:
    """Writes the data sets, what their columns are, and what is learned of conversations."""
    if not found:
        return
    for one in found:
        for note in one.notes:
            draft.note(key, note)
    if len(found) == 1:
        _one(draft, found[0], key, told)
    else:
        draft.put(key, [one.item() for one in found], told)
    if key == "dataset_name":
        columns = [dict(one.columns) for one in found if one.columns]
        forms = {one.form for one in found if one.form} - (
            {TURNS} if {one.form for one in found} == {TURNS, ALPACA} else set()
        )
        if len(forms) > 1 or any(other != columns[0] for other in columns) or 0 < len(columns) < len(found):
            what = ", ".join(f"{one.path} ({one.told})" for one in found)
            draft.refuse(
                key, f"rows are of one form here, or are made so by one set of columns: {what}; import them one by one"
            )
        elif columns:
            draft.put("columns", columns[0], found[0].told)
        elif found[0].told:
            draft.note(key, found[0].told)


def _one(draft: Draft, one: Rows, key: str, told: str) -> None:
    if key == "dataset_name":
        draft.put(key, one.path, told)
        if one.config is not None:
            draft.put("dataset_config", one.config, "name of its configuration")
        if one.split not in (None, SPLIT):
            draft.put("dataset_train_split", one.split, "split")
    else:
        special = one.config is not None or one.split not in (None, SPLIT)
        draft.put(key, [one.item()] if special else one.path, told)


def answers_alone(draft: Draft, found: Sequence[Rows], prompts_too: Any, key: str, usual: bool = True) -> None:
    """What carries loss: with other tools the answers, unless prompts do `too`; `usual`: so where nothing was said."""
    if draft.trainer != "sft":
        return
    if flag(prompts_too):
        draft.put("completion_only_loss", False, said(key, prompts_too))
    elif any(one.form == TURNS for one in found) and usual:
        draft.put(
            "assistant_only_loss", True, "answers alone carry loss there; a template marks them ({% generation %})"
        )


def held_out(draft: Draft, key: str, value: Any) -> None:
    """A share of the training rows, or so many of them."""
    share = number(value)
    if not share:
        draft.leave(key, "nothing is held out by itself")
    elif "eval_dataset" in draft.top:
        draft.leave(key, "held-out rows are named already")
    elif 0 < share < 1:
        draft.put("eval_dataset", f"{share * 100:g}%", said(key, value))
    else:
        draft.leave(key, "a share of the rows can be held out (eval_dataset: 5%), not a number of them")


def limited(draft: Draft, key: str, value: Any, found: Sequence[Rows]) -> None:
    """How many rows of each data set are read."""
    if len(found) > 1:
        draft.leave(key, "is of each data set there, and of all of them here (max_train_samples); weights divide them")
    elif (most := whole(value)) is not None:
        draft.put("max_train_samples", most, said(key, value))


def asked(prompt: str, completion: str, system: str | None = None, second: str | None = None) -> dict[str, str]:
    """Columns of a question and its answer, by the names of theirs; `second`: what stands below the question."""
    question = f"{{{prompt}}}" + (f"\n{{{second}}}" if second else "")
    if system:
        return {"system": f"{{{system}}}", "user": question, "assistant": f"{{{completion}}}"}
    return {"prompt": question, "completion": f"{{{completion}}}"}


def reads_turns(column: Any, who: Any, says: Any) -> bool:
    """Whether conversations under these names are read as they are."""
    return column in rows.TURNS and (who, says) in (("role", "content"), ("from", "value"))
