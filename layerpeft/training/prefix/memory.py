"""States that are kept in this process's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerpeft.text import note, size_text
from layerpeft.training.prefix.entries import Form, packed


class Memory:
    """At most `limit` bytes; or of the `newest` rows alone, for trainers whose rows never come again after a few steps.

    `bits`: 8 for a scale per token and a byte per number.
    """

    def __init__(self, limit: int | None = None, newest: int | None = None, bits: int | None = None) -> None:
        self.limit, self.newest, self.bits = limit, newest, bits
        self.size, self._full = 0, False
        self._kept: dict[bytes, tuple[torch.Tensor, Form]] = {}

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._kept)

    def has(self, key: bytes) -> bool:
        """Whether this row is there."""
        return key in self._kept

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor] | None:
        """The states (tokens, width) of these rows, which are not to be written to; None where one is missing."""
        found = [self._kept[key] for key in keys if key in self._kept]
        return [form.restored(data) for data, form in found] if len(found) == len(keys) else None

    def put(self, key: bytes, state: torch.Tensor) -> None:
        """Keeps a state, which is the store's own from now on; what does not fit is dropped."""
        kept = packed(state, self.bits) if key not in self._kept else None
        if kept is None:
            return
        if self.limit is not None and self.size + kept[0].nbytes > self.limit:
            if not self._full:
                self._full = True
                note(f"prefix_cache: {size_text(self.limit)} are full with {self.rows} rows; others are computed anew")
            return
        self._kept[key] = kept
        self.size += kept[0].nbytes
        while self.newest is not None and len(self._kept) > self.newest:
            self.size -= self._kept.pop(next(iter(self._kept)))[0].nbytes

    def flush(self) -> None:
        """All is there already."""

    def close(self) -> None:
        """Forgets all."""
        self._kept.clear()
        self.size = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, (self.limit, self.newest, self.bits)
