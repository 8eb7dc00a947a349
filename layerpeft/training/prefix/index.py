"""Where the entries of keys lie, for millions of rows in little memory."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

MIX, ALL = 0x9E3779B97F4A7C15, 2**64 - 1
GONE = -1
FEW = 2**16


class Index:
    """16 bytes a row in two sorted arrays, and a dict of the newest, which is merged into them when it has grown to an eighth.

    Keys of 16 bytes are told apart by 64 bits of them: whoever reads an entry sees whether it is of its key.
    """

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._view = self._sorted[0].data  # whose numbers are Python's
        self._newest: dict[int, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, key: bytes) -> int | None:
        """Its place, or None."""
        short = _short(key)
        place = self._newest.get(short)
        return self._old(short) if place is None else None if place == GONE else place

    def add(self, low: np.ndarray, high: np.ndarray, places: np.ndarray) -> None:
        """Keys by their halves (rows,) uint64, and their places (rows,) int64, in the stead of earlier ones."""
        short = low ^ (high * np.uint64(MIX))
        if len(self._newest) + len(short) > max(FEW, len(self._sorted[0]) // 8):
            self._merge(short, places)
            return
        for one, place in zip(short.tolist(), places.tolist(), strict=True):
            known = self._newest.get(one)
            self._count += (self._old(one) is None) if known is None else known == GONE
            self._newest[one] = place

    def forget(self, key: bytes) -> None:
        """As if it had never been there."""
        if self.find(key) is not None:
            self._newest[_short(key)] = GONE
            self._count -= 1

    def _old(self, short: int) -> int | None:
        at = bisect_left(self._view, short)
        return int(self._sorted[1][at]) if at < len(self._view) and self._view[at] == short else None

    def _merge(self, short: np.ndarray, places: np.ndarray) -> None:
        newest = (np.fromiter(self._newest.keys(), np.uint64), np.fromiter(self._newest.values(), np.int64))
        shorts = np.concatenate([self._sorted[0], newest[0], short])
        places = np.concatenate([self._sorted[1], newest[1], places])
        order = np.argsort(shorts, kind="stable")
        shorts, places = shorts[order], places[order]
        last = np.append(shorts[1:] != shorts[:-1], True) if len(shorts) else np.empty(0, bool)
        last &= places != GONE
        self._sorted = shorts[last], places[last]
        self._view = self._sorted[0].data
        self._newest, self._count = {}, int(last.sum())


def _short(key: bytes) -> int:
    low, high = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")
    return low ^ (high * MIX & ALL)
