"""What kept states hang on besides their rows: the weights below the cut, where that is, and how they are computed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import transformers
from torch import nn

from layerpeft.integrations import distributed
from layerpeft.integrations.engines.known import is_cut
from layerpeft.training.prefix.below import Below, modules_below
from layerpeft.training.verify import checksum


def belongs_to(model: nn.Module, below: Below) -> dict[str, str]:
    """As text. Where processes hold parts of weights every one must ask."""
    config: Any = getattr(model, "config", None)
    return {
        "model": type(model).__name__,
        "cut": below.block,
        "weights": _digest(model, below),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "transformers": transformers.__version__,
    }


def _digest(model: nn.Module, below: Below) -> str:
    """Of names, types, shapes and bits of all that lies below the cut, and of the buffers of the model."""
    held = {f"{n}.{k}": t for n, m in modules_below(model, below) for k, t in m._parameters.items() if t is not None}
    held |= {name: buffer for name, buffer in model.named_buffers() if not _above(name, below)}
    found = hashlib.sha256()
    for name, tensor in sorted(held.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor):x};".encode())
    if any(is_cut(tensor) for tensor in held.values()):
        own = torch.zeros(distributed.world_size(), dtype=torch.int64)
        own[distributed.rank()] = int.from_bytes(found.digest()[:7], "little")
        return hashlib.sha256(str(distributed.add_up(own).tolist()).encode()).hexdigest()
    return found.hexdigest()


def _above(name: str, below: Below) -> bool:
    return any(name.startswith(f"{block}.") for block in below.names[below.cut :])
