"""What kept states hang on besides their rows: the weights below the cut, where that is, and how they are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
    held = held_below(model, below)
    found = digest_of(told(held))
    if any(is_cut(tensor) for tensor in held.values()):
        own = torch.zeros(distributed.world_size(), dtype=torch.int64)
        own[distributed.rank()] = int.from_bytes(bytes.fromhex(found)[:7], "little")
        found = hashlib.sha256(str(distributed.add_up(own).tolist()).encode()).hexdigest()
    return belongs(model, below, found)


def belongs(model: nn.Module, below: Below, weights: str) -> dict[str, str]:
    """The same with the digest of the weights below, which need not all be there."""
    config: Any = getattr(model, "config", None)
    return {
        "model": type(model).__name__,
        "cut": below.block,
        "weights": weights,
        "attention": str(getattr(config, "_attn_implementation", None)),
        "transformers": transformers.__version__,
    }


def held_below(model: nn.Module, below: Below) -> dict[str, torch.Tensor]:
    """All that lies below the cut, and the buffers of the model, by name."""
    held = {f"{n}.{k}": t for n, m in modules_below(model, below) for k, t in m._parameters.items() if t is not None}
    return held | {name: buffer for name, buffer in model.named_buffers() if not _above(name, below)}


def told(held: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names, types, shapes and bits in a few words for each."""
    return {name: f"{name} {t.dtype} {tuple(t.shape)} {checksum(t):x};" for name, t in held.items()}


def digest_of(lines: Mapping[str, str]) -> str:
    """Of what was `told` of all that is held, in any order."""
    return hashlib.sha256("".join(line for _, line in sorted(lines.items())).encode()).hexdigest()


def _above(name: str, below: Below) -> bool:
    return any(name.startswith(f"{block}.") for block in below.names[below.cut :])
