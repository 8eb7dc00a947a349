"""States that are kept in a folder, shared by all runs and processes of which they are states."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layerpeft.text import note
from layerpeft.training.prefix.entries import packed
from layerpeft.training.prefix.folders import size_of_folder
from layerpeft.training.prefix.journals import Damaged
from layerpeft.training.prefix.opened import Opened

FORMAT = "1"  # of what lies in a folder
WAITING = 256 << 20  # bytes that may wait to be written; what comes then is dropped
BATCH, MOST = 32 << 20, 1024  # bytes and entries that are written at a time
LINGER = 0.1  # seconds for which the writer waits for more
WRITING = "written to"


class Disk:
    """A store below `root`, of states that hang on what `belongs` says; `bits`: 8 for a scale per token and a byte per number.

    All folders below `root` together, of all processes, hold at most `limit` bytes (None: half of what would be free without
    them): those that nobody uses make room, the longest unused first, and what then does not fit is dropped. Nothing here
    raises: what cannot be read or written is missing, which is said once (`unwritten`: why what was put could not be). State is
    real here: what waits for the writer, a thread that ends when nothing does. `pinned`: states come in pinned memory.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        belongs: Mapping[str, str],
        limit: int | None = None,
        bits: int | None = None,
        pinned: bool = False,
    ) -> None:
        self.root, self.belongs, self.limit, self.bits, self.pinned = Path(root), dict(belongs), limit, bits, pinned
        self._said: set[str] = set()
        self.unwritten: str | None = None
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: dict[bytes, torch.Tensor] = {}
        self._bytes = 0
        self._writer: threading.Thread | None = None
        said = {"format": FORMAT, "bits": str(self.bits or "as they are")}
        self._opened = Opened(self.root, self.belongs | said, self.limit)

    @property
    def folder(self) -> Path:
        """The one below `root`, which others with the same `belongs` and `bits` share."""
        return self._opened.folder

    @property
    def rows(self) -> int:
        """How many there are, of all processes."""
        with self._here():
            self._refresh()
            return len(self._opened) + sum(key not in self._opened for key in self._waiting)

    @property
    def size(self) -> int:
        """Bytes in the folder."""
        return size_of_folder(self.folder)

    def has(self, key: bytes) -> bool:
        """Whether this row is there."""
        with self._here():
            return self._there([key])

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor] | None:
        """The states of these rows, which are not to be written to; None where one is missing, or damaged: it is forgotten then."""
        with self._here():
            if not self._there(keys):
                return None
        found = [state for key in keys if (state := self._state(key)) is not None]
        return found if len(found) == len(keys) else None

    def ahead(self, keys: Sequence[bytes]) -> None:
        """Has the system read the states of these rows, as far as they are there, before they are asked for."""
        self._here()
        for key in keys:
            try:
                self._opened.ahead(key)
            except (OSError, Damaged):
                continue  # `get` says so

    def put(self, key: bytes, state: torch.Tensor) -> None:
        """Keeps a state (tokens, …), which is the store's own from now on. Nothing is waited for: a thread writes it, and where
        that is 256 MiB behind, the state is dropped; `flush` lets it catch up."""
        with self._here():
            if self._closed or key in self._waiting or key in self._opened:
                return
            if self._waiting and self._bytes + state.nbytes > WAITING:
                self._say("is written to more slowly than states come; what does not get there is computed anew")
                return
            self._waiting[key] = state.detach()
            self._bytes += state.nbytes
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="layerpeft-prefix")
                try:
                    self._writer.start()
                except RuntimeError:  # the interpreter ends
                    self._writer, self._waiting, self._bytes = None, {}, 0
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until nothing waits to be written."""
        with self._here():
            self._changed.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        """Writes what waits, and lets go of the folder."""
        self.flush()
        with self._here():
            self._closed = True
            self._opened.leave()

    def __deepcopy__(self, memo: Any) -> Disk:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Disk, (self.root, self.belongs, self.limit, self.bits, self.pinned)

    def _here(self) -> threading.Condition:
        """What guards all that waits; a forked process has files, and things that wait, of its own."""
        if os.getpid() != self._process:
            self._start()
        return self._changed

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            note(f"prefix_cache: {self.root} {what}")

    def _failed(self, doing: str, error: Exception) -> None:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        if doing == WRITING:
            self.unwritten = why
        self._say(f"cannot be {doing} ({why}); what is not there is computed anew")

    def _there(self, keys: Sequence[bytes]) -> bool:
        def known() -> bool:
            return all(key in self._waiting or key in self._opened for key in keys)

        return known() or self._refresh() and known()

    def _refresh(self) -> bool:
        if not self._closed:
            try:
                self._opened.refresh()
            except OSError as error:
                self._failed("read", error)
        return not self._closed

    def _state(self, key: bytes) -> torch.Tensor | None:
        with self._changed:
            waiting = self._waiting.get(key)
        if waiting is not None:
            kept = packed(waiting, self.bits) if self.bits else None  # as it will be once it is written
            return kept[1].restored(kept[0]) if kept else waiting
        try:
            return self._opened.read(key, self.pinned)
        except Damaged:
            self._say("holds damaged entries, which are computed anew")
        except OSError as error:
            self._failed("read", error)
        return None

    def _write(self) -> None:
        """The thread: writes what waits, and ends when nothing more comes."""
        while True:
            with self._changed:
                if not self._waiting and not self._changed.wait_for(lambda: bool(self._waiting), LINGER):
                    self._writer = None
                    return
                batch, size = {}, 0
                for key, state in self._waiting.items():
                    batch[key] = state
                    size += state.nbytes
                    if size >= BATCH or len(batch) == MOST:
                        break
            try:
                ready = [(key, *kept) for key, state in batch.items() if (kept := packed(state, self.bits)) is not None]
                if len(ready) < len(batch):
                    self._say("cannot hold states of such a type or shape")
                for sentence in self._opened.append(ready):
                    self._say(sentence)
            except Exception as error:  # the trainer does not hear of it
                self._failed(WRITING, error)
            with self._changed:
                for key in batch:
                    self._bytes -= self._waiting.pop(key).nbytes
                self._changed.notify_all()
