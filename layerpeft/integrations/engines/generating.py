"""Text from a model whose weights are divided among the processes; all of them generate the same."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Inside, `model.generate` runs as a forward pass does under FSDP2, with what stands outside of the blocks whole."""
    if not isinstance(model, FSDPModule):
        yield
        return
    register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        del model.__dict__["generate"]
