"""One folder of states as a process has it open: where entries lie, what others add, and how its own get there."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from layerpeft.text import size_text
from layerpeft.training.prefix import folders
from layerpeft.training.prefix.entries import SIZE, Form
from layerpeft.training.prefix.folders import BEAT, Handle
from layerpeft.training.prefix.index import Index
from layerpeft.training.prefix.journals import Damaged, Journals, Own


class Opened:
    """State is real here: the mark that the folder is used, the files, the index and how far it has read. For any thread."""

    def __init__(self, root: Path, belongs: Mapping[str, str], limit: int | None) -> None:
        self.root, self.belongs, self.limit = root, belongs, limit
        self.folder = folders.folder_of(root, belongs)
        self._lock = threading.RLock()
        self._begin()

    def _begin(self) -> None:
        self._used: Handle | None = None
        self._own: Own | None = None
        self._index, self._journals = Index(), Journals(self.folder)
        self._beat: bytes | None = None  # as of what was read

    def leave(self) -> None:
        """Was used until now, and is not any more."""
        with self._lock:
            if self._used is not None:
                with contextlib.suppress(OSError):
                    os.utime(self._used.fd)
            self._begin()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        """As far as it has been read."""
        with self._lock:
            return self._index.find(key) is not None

    def refresh(self) -> None:
        """Takes in what has been written since, by any process; where that is nothing, it costs one read of 8 bytes.
        Raises: OSError."""
        with self._lock:
            self._used = self._used or folders.use(self.folder)
            if self._used is not None:
                beat = os.pread(self._used.fd, BEAT, 0)
                if beat != self._beat:
                    failed, self._beat = self._journals.news(self._index), beat
                    if failed is not None:
                        raise failed

    def read(self, key: bytes, pinned: bool) -> torch.Tensor | None:
        """The state of a row, None where there is none. Raises: OSError, Damaged; it is forgotten then."""
        with self._lock:
            place, journals = self._index.find(key), self._journals
        if place is None:
            return None
        try:
            return journals.read(place, key, pinned)
        except (OSError, Damaged) as error:
            if isinstance(error, Damaged):
                journals.strike(place)
            with self._lock:
                if self._index.find(key) == place:
                    self._index.forget(key)
            raise

    def ahead(self, key: bytes) -> None:
        """Has the system read it. Raises: OSError; Damaged."""
        with self._lock:
            place = self._index.find(key)
        if place is not None:
            self._journals.ahead(place)

    def append(self, rows: Sequence[tuple[bytes, torch.Tensor, Form]]) -> Iterator[str]:
        """Writes what is not there yet and fits: keys, bytes, and what they mean; what is to be said of it. Raises: OSError."""
        with folders.locked(self.root):
            if self._used is not None and not folders.is_there(self.folder, self._used):
                yield "was removed, and is begun anew"
                with self._lock:
                    self._begin()
            self.refresh()
            if self.limit is None:
                self.limit = folders.half_of_the_rest(self.root)
            rows = [row for row in rows if row[0] not in self]
            costs = [len(data) + SIZE for _, data, _ in rows]
            new = 0 if self._used is not None else folders.bytes_of_new(self.belongs)
            least, need = new + min(costs, default=0), new + sum(costs)
            left, fit = folders.room(self.root, self.folder, least, need, self.limit) - new, []
            for row, cost in zip(rows, costs, strict=True):
                if cost <= left:
                    fit.append(row)
                    left -= cost
            if len(fit) < len(rows):
                yield f"is full ({size_text(self.limit)}); what does not fit is computed anew"
            if fit:
                with self._lock:  # others look for the folder meanwhile
                    self._used = self._used or folders.make(self.folder, self.belongs)
                    self._own = self._own or Own(self.folder)
                try:
                    self._own.append(fit)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # what nobody uses makes room for what comes next
                        folders.room(self.root, self.folder, 0, need, sum(folders.sizes(self.root).values()))
                    raise
                finally:
                    folders.beat(self._used)
                    self.refresh()
