"""The files of a folder of states: each process appends to a data file and a journal of its own, and reads those of all."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from layerpeft.training.prefix.entries import FIELDS, SIZE, Entry, Form, entry_of, record_of
from layerpeft.training.prefix.folders import DATA, JOURNAL, Handle
from layerpeft.training.prefix.index import Index

OPEN = 64  # files that are held open, whatever their number
CHUNK = 2**16  # records that are read at a time
_RECORDS = 40  # bits of a place that number the record in its journal; those above number the journal


class Damaged(Exception):
    """An entry is not what was written."""


class Journals:
    """Those of all processes, to read. Files are read and never mapped: one that is cut short, or a disk that fails, is an error
    that can be caught, where a mapped one would end the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: list[str] = []
        self._read: dict[str, tuple[int, int]] = {}  # the number of a journal, and how many records of it are known
        self._open: OrderedDict[str, Handle] = OrderedDict()
        self._lock = threading.Lock()

    def news(self, index: Index) -> OSError | None:
        """Adds what has been written since, by any process; why a journal cannot be read, which is left out. Raises: OSError."""
        with os.scandir(self.folder) as files:
            found = [(file.name, file.stat().st_size // SIZE) for file in files if file.name.endswith(JOURNAL)]
        parts, failed = [], None
        for file, count in sorted(found):
            name = file.removesuffix(JOURNAL)
            if name not in self._read:
                self._read[name] = len(self._names), 0
                self._names.append(name)
            number, known = self._read[name]
            while known < count:
                data = bytearray(min(count - known, CHUNK) * SIZE)
                try:
                    whole = self._handle(file).read_into(memoryview(data), known * SIZE) // SIZE
                except OSError as error:
                    whole, failed = 0, error
                if not whole:
                    break
                records = np.frombuffer(data, FIELDS, whole)
                there = records["type"].nonzero()[0]
                parts.append((records["low"][there], records["high"][there], there + (known + (number << _RECORDS))))
                known += whole
                self._read[name] = number, known
        if parts:
            low, high, places = (np.concatenate(part) for part in zip(*parts, strict=True))
            index.add(low, high, places)
        return failed

    def read(self, place: int, key: bytes, pinned: bool = False) -> torch.Tensor | None:
        """The state that lies there; None where it is another row's. Raises: OSError; Damaged."""
        entry, name = self._entry(place), self._name(place)
        if entry.key != key:
            return None
        data = _memory(entry.length, pinned)
        try:
            count = self._handle(name + DATA).read_into(data.numpy().data, entry.offset)
        except FileNotFoundError as error:
            raise Damaged from error
        if count < entry.length or not entry.fits(data):
            raise Damaged
        return entry.form.restored(data)

    def ahead(self, place: int) -> None:
        """Has the system read it while others things are done. Raises: OSError; Damaged."""
        entry = self._entry(place)
        if hasattr(os, "posix_fadvise"):
            handle = self._handle(self._name(place) + DATA)
            os.posix_fadvise(handle.fd, entry.offset, entry.length, os.POSIX_FADV_WILLNEED)

    def strike(self, place: int) -> None:
        """Nobody finds it any more, where the journal can be written."""
        with contextlib.suppress(OSError):
            os.pwrite(self._handle(self._name(place) + JOURNAL).fd, bytes(SIZE), _at(place))

    def _entry(self, place: int) -> Entry:
        record = os.pread(self._handle(self._name(place) + JOURNAL).fd, SIZE, _at(place))
        entry = entry_of(record)
        if entry is None:
            raise Damaged
        return entry

    def _name(self, place: int) -> str:
        return self._names[place >> _RECORDS]

    def _handle(self, name: str) -> Handle:
        with self._lock:
            handle = self._open.pop(name, None) or Handle(self.folder / name, os.O_RDWR, os.O_RDONLY)
            self._open[name] = handle
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return handle


class Own:
    """The two files of this process. An entry counts once its record is whole, which is written after its data."""

    def __init__(self, folder: Path) -> None:
        """Raises: OSError."""
        name = secrets.token_hex(8)
        self._data, self._journal = (
            Handle(folder / f"{name}{kind}", os.O_RDWR | os.O_CREAT | os.O_EXCL) for kind in (DATA, JOURNAL)
        )
        self._end = self._count = 0

    def append(self, rows: Sequence[tuple[bytes, torch.Tensor, Form]]) -> None:
        """Keys, bytes and what they mean. Raises: OSError, when as many as there was room for have been written."""
        ends, records, failed = [self._end], [], None
        try:
            for key, data, form in rows:
                self._data.write(data.numpy().data, ends[-1])
                records.append(record_of(key, ends[-1], data, form))
                ends.append(ends[-1] + len(data))
        except OSError as error:
            failed = error
        while records or failed is not None:
            try:
                if failed is not None:  # which may make room for the journal
                    os.ftruncate(self._data.fd, ends[len(records)])
                self._journal.write(memoryview(b"".join(records)), self._count * SIZE)
                break
            except OSError as error:
                failed = error
                with contextlib.suppress(OSError):
                    os.ftruncate(self._journal.fd, self._count * SIZE)
                if not records:
                    break
                del records[len(records) // 2 :]
        self._end, self._count = ends[len(records)], self._count + len(records)
        if failed is not None:
            raise failed


def _memory(size: int, pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:  # no accelerator, or no more memory that can be pinned
        return torch.empty(size, dtype=torch.uint8)


def _at(place: int) -> int:
    return (place & (1 << _RECORDS) - 1) * SIZE
