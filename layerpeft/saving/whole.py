"""Folders that are written as a whole, by a merge or an export: each is on record as such, so that a later one may replace it.

What layerpeft did not write there is never removed: it stays, and what was changed since is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from layerpeft.errors import SaveError
from layerpeft.integrations.files import must_be_new, read_json, written_whole
from layerpeft.saving.owned import RECORD, files_below, listed, strangers, vouch
from layerpeft.text import some

MARK = "whole"  # in the record: what wrote the folder


def refusal(
    target: Path, overwrite: bool, reads: Iterable[str | os.PathLike[str] | None], other: str = "name a new folder"
) -> str | None:
    """Why nothing can be written to a folder, or None. `overwrite`: an earlier merge or export of ours gives way; `reads`: folders
    (names of the hub among them) that are read meanwhile, and may not; `other`: how another one is named."""
    why = must_be_new(target)
    if why is None or not target.is_dir():
        return why
    if not _is_whole(target):
        return f"{target} is not empty, and no earlier merge or export of layerpeft's: {other}"
    if not overwrite:
        return f"{target} is not empty: {other}, or replace what was written there before (--overwrite, overwrite=True)"
    real = target.resolve()
    for place in (Path(place) for place in reads if place is not None and Path(place).is_dir()):
        if place.resolve().is_relative_to(real):
            return f"{target} holds {place}, which is read: {other}"
    if changed := strangers(target, list(listed(target / RECORD))):
        return f"{target} holds what was changed since it was written: {some(changed)}; move that away, or {other}"
    return None


def _is_whole(folder: Path) -> bool:
    """Whether a merge or an export wrote it, and its record is as it was written."""
    try:
        return bool(listed(folder / RECORD)) and isinstance(read_json(folder / RECORD).get(MARK), str)
    except SaveError:
        return False


@contextmanager
def writing_whole(target: Path, what: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `target` at the end, and says that `what` wrote its files. `target` may
    be replaced (`refusal`). Raises: SaveError where it is in the way by then."""
    old = {*listed(target / RECORD), RECORD} if _is_whole(target) else ()
    with written_whole(target, old) as partial:
        yield partial
        vouch(partial / RECORD, {"format": 1, MARK: what}, files_below(partial, ""))
