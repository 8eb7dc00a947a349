"""What a place to keep states in can do."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Store(Protocol):
    """States (tokens, …) on the CPU, by the keys of rows. Nothing here raises: what cannot be kept is computed anew."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def size(self) -> int:
        """Bytes of all that is kept."""
        ...

    def has(self, key: bytes) -> bool:
        """Whether this row is there."""
        ...

    def get(self, keys: Sequence[bytes]) -> list[torch.Tensor] | None:
        """The states of these rows, which are not to be written to; None where one is missing."""
        ...

    def put(self, key: bytes, state: torch.Tensor) -> None:
        """Keeps a state, which is the store's own from now on; never blocks for longer than a copy."""
        ...

    def flush(self) -> None:
        """All that was put is written."""
        ...

    def close(self) -> None:
        """No more is asked of it."""
        ...
