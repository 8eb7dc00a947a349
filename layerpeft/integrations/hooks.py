"""What torch does not promise about the hooks of tensors: whether one is there."""

from __future__ import annotations

import torch


def has_hook(tensor: torch.Tensor, kind: type) -> bool:
    """Whether the tensor has a hook of this class; copies and pickles of a parameter have none."""
    return any(isinstance(hook, kind) for hook in (tensor._backward_hooks or {}).values())
