"""Going on from a Trainer's checkpoint of a model of which every process holds a part.

Accelerate and torch load it tensor by tensor, and know no choice and no schedule: those are taken up here, before they ask the
model what it lacks.
"""

import os
from collections.abc import Iterable
from typing import Any

from layerpeft.errors import SaveError
from layerpeft.integrations import trainer
from layerpeft.integrations.engines.fsdp import FSDP2
from layerpeft.integrations.files import as_written
from layerpeft.saving.manifest import MANIFEST, read_manifest
from layerpeft.selection.select import Selection
from layerpeft.training.follower import Follower


def resume(followers: Iterable[Follower], model: Any, folder: str) -> bool:
    """Takes up what the run that saved this checkpoint chose and trained; whether there is nothing left to load but optimizers.

    A folder without an adapter's files (sharded state dicts) tells the choice alone. Raises: SaveError, SelectionError.
    """
    loaded = []
    for follower in followers:
        follower.holdings.forget()  # Accelerate has put others in their place
        if not any(FSDP2.is_part(p) for group in follower.holdings.tensors().values() for p in group.values()):
            continue
        place = folder if follower.adapter == "default" else os.path.join(folder, follower.adapter)
        whole = os.path.isfile(os.path.join(place, MANIFEST))
        if not whole and follower.method.folds:
            raise SaveError(
                f"{place} holds no adapter ({MANIFEST} is missing), and what a projection has folded into the weights is nowhere "
                "else: go on from a checkpoint that was saved whole"
            )
        _choose(follower, folder, place if whole else None)
        loaded.append(whole)
        if whole:
            with follower.schedule.states_follow():
                model.load_adapter(place, follower.adapter, is_trainable=True)
        follower.schedule.lay_out()
    return bool(loaded) and all(loaded)


def _choose(follower: Follower, folder: str, place: str | None) -> None:
    """Settles a choice that waits, or moves a schedule, to where that run stood."""
    if place is not None:
        if follower.pending is not None and not follower.schedule.switches:
            chosen = read_manifest(place).get("selection")
            _settle(follower, place, chosen)
        return
    record = trainer.records_in(folder).get(follower.adapter)
    if record is None:
        raise SaveError(f"{folder} says nothing of the adapter {follower.adapter!r}: it was saved without layerpeft")
    with as_written(f"{folder} does not hold the run that was saved"):
        if follower.schedule.switches:
            with follower.schedule.states_follow():
                follower.schedule.restore(record["schedule"], {}, folder)
            follower.waiting.drop()
            follower.method.went_on(follower.schedule.ever())
        elif follower.pending is not None:
            _settle(follower, folder, record["selection"])


def _settle(follower: Follower, folder: str, chosen: Any) -> None:
    if chosen is None:
        return  # it was waiting itself
    kept = follower.waiting.kept(set(Selection.from_dict(chosen).targets))
    if kept is None:
        raise SaveError(f"the run in {folder} chose among other targets than this model has")
    follower.waiting.settle(kept)
