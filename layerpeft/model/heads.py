"""Attention heads: how many outputs the projection after attention reads, and which of its columns read one of them."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from layerpeft.model.architectures import Matrix

AFTER_ATTENTION = "attention.o"  # the role of that projection
HEAD = "head"  # the kind of a target that is one head
_NAME = re.compile(r"(.+)\.head_(\d+)")
# by what attention modules call the size of one head's output (MLA's values have a size of their own), and their number
_SIZES = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "dim_per_head")
_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


def heads_of(matrix: Matrix, above: Iterable[nn.Module], config: Any) -> int:
    """How many heads a projection reads, by the size or number of them that the modules around it (`above`, the nearest first)
    know, or the config; 0 where these disagree, say nothing, or the projection is not called as a module."""
    width, above = matrix.shape[-1], list(above)
    if matrix.kind not in ("linear", "conv1d") or any(isinstance(m, nn.MultiheadAttention) for m in above[:1]):
        return 0
    near = [vars(m) for m in above[:1]]
    size: Any = next((s for held in near for n in _SIZES if _number(s := held.get(n))), None)
    count: Any = next((c for held in near for n in _COUNTS if _number(c := held.get(n))), None)
    if size is None and count is None:
        size = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
        count = next((c for n in _COUNTS if _number(c := getattr(config, n, None))), None)
    if not _number(size):
        return count if count and width % count == 0 else 0
    found = width // int(size or 1)
    return found if found * int(size or 1) == width and (not count or count == found) else 0


def name_of(projection: str, head: int) -> str:
    """What a head is called."""
    return f"{projection}.head_{head}"


def place_of(name: str) -> tuple[str, int] | None:
    """The projection and the number of a head; None of any other name."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def holder(name: str) -> str:
    """The module that a target lies in, or is: of a head its projection."""
    found = place_of(name)
    return found[0] if found else name


def columns(name: str, size: int) -> slice:
    """Which columns of its projection read a head of this size."""
    found = place_of(name)
    assert found is not None
    return columns_of(found[1], size)


def columns_of(head: int, size: int) -> slice:
    """The same, by the head's number."""
    return slice(head * size, (head + 1) * size)


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
