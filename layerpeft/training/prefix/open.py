"""Where states are kept: the store that a setting means for one model and one cut."""

from __future__ import annotations

import atexit
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import nn

from layerpeft.integrations import distributed
from layerpeft.text import note
from layerpeft.training.prefix.below import Below
from layerpeft.training.prefix.disk import Disk
from layerpeft.training.prefix.fingerprint import belongs_to
from layerpeft.training.prefix.memory import Memory
from layerpeft.training.prefix.setting import Setting
from layerpeft.training.prefix.source import Source
from layerpeft.training.prefix.store import Store

SHARED = Path("/dev/shm")  # files in memory that processes share, where the system has them


@dataclass(frozen=True)
class Opener:
    """What opens the store. Processes of one machine share its memory, since samplers deal rows anew in every epoch.

    `source`: what was filled ahead is taken, in the place of what belongs to the weights below, which are not there.
    """

    setting: Setting
    source: Source | None = None

    def __call__(self, model: nn.Module, below: Below) -> Store:
        """The store for states that enter `below.block`. No process waits for another, unless each holds a part of the model."""
        asked = self.setting
        pinned = next(model.parameters()).device.type not in ("cpu", "meta")
        if (source := self.source) is not None:
            return Disk(source.root, source.ahead.belongs, asked.limit, source.ahead.bits, pinned)
        if asked.where == "memory":
            several = distributed.world_size() > 1
            limit = psutil.virtual_memory().available // 2 if asked.limit is None else asked.limit
            root = _shared(limit) if several else None
            if root is None:
                return Memory(limit, bits=asked.bits)
            return Disk(root, belongs_to(model, below), limit, asked.bits, pinned)
        return Disk(asked.root, belongs_to(model, below), asked.limit, asked.bits, pinned)


def _shared(limit: int) -> Path | None:
    """A folder of this run in the memory of the machine, which goes with its processes; None where there is not as much room.

    Its name is what those that one launcher has started know alike: one of them may come here alone.
    """
    room = shutil.disk_usage(SHARED).free if os.access(SHARED, os.W_OK) else 0
    if room < min(limit, 1 << 30):
        note("prefix_cache: processes keep states of their own, and find a row where it comes to the same one again")
        return None
    own = f"layerpeft-{os.getuid()}-"
    for left in SHARED.glob(f"{own}*"):  # by processes that were killed
        number = left.name.removeprefix(own).partition("-")[0]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    root = SHARED / f"{own}{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"
    root.mkdir(mode=0o700, exist_ok=True)
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root
