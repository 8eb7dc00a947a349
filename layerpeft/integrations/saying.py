"""One of several processes says what all of them know. Nothing here imports torch: a misspelt word must not wait for it."""

import os
import sys
from typing import Any

# read when those libraries are imported
BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def without_bars() -> None:
    """Leaves progress bars of libraries to the first process, and to terminals."""
    for name in BARS:
        os.environ.setdefault(name, "1")


def says(what: str) -> bool:
    """Whether this process is the one that is to print an error: the first to ask, of those that ask for the same.

    The processes of a group ask its store, which takes no turn of the others. Before there is one, one of each machine says it.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return True
    group: Any = sys.modules.get("torch.distributed")
    if group is not None and group.is_available() and group.is_initialized():
        try:
            return group.distributed_c10d._get_default_store().add(f"layerpeft/{what}", 1) == 1
        except Exception:  # the process that keeps the store has ended
            return True
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")
