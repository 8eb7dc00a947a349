"""What is kept of a trainer's next rows is read while the step before them is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layerpeft.training.prefix.cache import PrefixCache
from layerpeft.training.prefix.disk import Disk

_IDS = ("input_ids", "inputs_embeds")


def read_ahead(cache: PrefixCache, batch: Any) -> None:
    """A trainer has a batch ready that one of its next passes will be called with. Where the last pass tells how keys of its rows
    are made, the system begins to read their states, which lie on a disk."""
    if cache.kind is None or cache.rests or not isinstance(cache.store, Disk) or not isinstance(batch, Mapping):
        return
    keyed, dtype, several, names = cache.kind
    inputs = {name: value for name, value in batch.items() if name in names}
    tokens = next((inputs[name] for name in _IDS if isinstance(inputs.get(name), torch.Tensor)), None)
    if tokens is not None and tokens.dim() > 1 and not keyed.decoder:
        rows = keyed.alike(inputs, (tokens.shape[0], tokens.shape[1]), dtype, several)
        cache.store.ahead([row.key for row in rows])
