"""Forward passes on the side: evaluation mode without gradients, and everything put back afterwards."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.integrations import distributed
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.model.layers import base_of


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no cache; both, what requires a gradient, and every random state are put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    config = getattr(base_of(model), "config", None)
    cache = getattr(config, "use_cache", None)
    devices, kind = distributed.random_devices({p.device for p in model.parameters()})
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            model.eval()
            if cache:
                config.use_cache = False  # type: ignore[union-attr]
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
            if cache:
                config.use_cache = cache  # type: ignore[union-attr]
            random.setstate(python_state)
            if numpy and numpy_state:
                numpy.random.set_state(numpy_state)


@contextmanager
def nothing_trains(model: nn.Module) -> Iterator[None]:
    """As found, and until then nothing requires a gradient.

    Where gradient checkpointing is on, the flag that turns it on (training, on the block itself) stays on.
    """
    working = [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False)]
    found = [(m, n, v) for m in working for n, v in vars(m).items() if "dropout" in n and isinstance(v, float)]
    with as_found(model):
        try:
            for module in working:
                module.training = True
            for module, name, _ in found:
                setattr(module, name, 0.0)  # blocks that call F.dropout themselves go by their own flag
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            yield
        finally:
            for module, name, rate in found:
                setattr(module, name, rate)


@contextmanager
def evaluating(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """As found, and until then no gradients, under autocast to `dtype`."""
    on = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")
    keep_cpu_layout(model)
    with as_found(model), torch.no_grad(), torch.autocast(on, dtype=dtype, enabled=dtype is not None):
        yield


@contextmanager
def standing_in(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a block does this in the place of its own `forward`."""
    own = vars(block).get("forward")
    block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own  # type: ignore[method-assign]


def to_model(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs where the model computes (offloaded weights have no storage; their hooks bring the inputs along).

    Raises: ScoreError for a batch that is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise ScoreError(
            f"a batch must be a mapping of model inputs (input_ids, labels, …), not {type(batch).__name__}"
        )
    devices = (p.device for p in model.parameters())
    device = next((d for d in devices if d.type != "meta"), torch.device("cpu"))
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
