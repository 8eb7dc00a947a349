"""Memory of a process as the system counts it, while something runs: anonymous pages, and all that is resident."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpeft.integrations.torch import give_back

STATUS = Path("/proc/self/status")
EVERY = 0.001  # seconds between two looks


@dataclass(frozen=True)
class Memory:
    """Bytes over what the process had before: `peak` and `after` of anonymous pages; `resident`: peak, pages of files included."""

    peak: int
    after: int
    resident: int
    seconds: float


def here() -> bool:
    """Whether this system tells (Linux)."""
    return STATUS.is_file() and "RssAnon" in STATUS.read_text(encoding="ascii")


def watched(function: Callable[[], Any]) -> tuple[Any, Memory]:
    """What the function returns, and the memory that it took."""
    gc.collect()
    give_back()
    anonymous, resident = _look()
    peak, stop = [anonymous, resident], threading.Event()

    def look() -> None:
        while not stop.wait(EVERY):
            for i, value in enumerate(_look()):
                peak[i] = max(peak[i], value)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    start = time.perf_counter()
    try:
        result = function()
    finally:
        seconds = time.perf_counter() - start
        stop.set()
        thread.join()
    gc.collect()
    give_back()
    return result, Memory(peak[0] - anonymous, _look()[0] - anonymous, peak[1] - resident, round(seconds, 2))


def _look() -> tuple[int, int]:
    """Bytes of anonymous pages, and of all resident ones."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return tuple(1024 * int(lines[key].split()[0]) for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
