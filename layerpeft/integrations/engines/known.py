"""The engines there are, which of them is asked for, and which a tensor belongs to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from layerpeft.integrations.engines import deepspeed
from layerpeft.integrations.engines.deepspeed import ZERO
from layerpeft.integrations.engines.engine import Engine
from layerpeft.integrations.engines.fsdp import FSDP1, FSDP2
from layerpeft.integrations.engines.zero import DividedOptimizer

DDP = Engine(key="ddp", name="DDP", argument="", asked=lambda _: False)  # what runs where no other one is asked for
ENGINES = (*ZERO, FSDP1, FSDP2, DDP)
_CUTTING = tuple(engine for engine in ENGINES if "weights" in engine.divides)


def asked_for(args: Any = None) -> Engine | None:
    """The engine that training arguments (or anything with their attributes), or `accelerate launch`, ask for; None for DDP."""
    return next((engine for engine in ENGINES if engine.asked(args)), None)


def is_cut(tensor: Any) -> bool:
    """Whether each process holds a part of this tensor only."""
    return any(engine.is_part(tensor) for engine in _CUTTING)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's own part of a tensor that is cut up over processes; the tensor itself where it is not."""
    return next((engine.local(tensor) for engine in _CUTTING if engine.is_part(tensor)), tensor)


def rewritten(tensor: torch.Tensor) -> None:
    """This process's own part holds something else, and so must what has been put together of all parts; every process must ask."""
    if deepspeed.is_part(tensor):
        deepspeed.rewritten(tensor)


def cut_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process has, cut up like that one, in its own type; one that is cut up already. No process asks
    another."""
    return next((e.cut_like(whole, like) for e in _CUTTING if e.is_part(like) and not e.is_part(whole)), whole)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of such a tensor, in every process, each of which must ask; the tensor itself where it is not cut up."""
    return next((engine.whole(tensor) for engine in _CUTTING if engine.is_part(tensor)), tensor)


@torch.no_grad()
def put(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Puts what every process has whole into a tensor, or this process's part of that into this process's part of it."""
    local(tensor.detach()).copy_(local(cut_like(whole, tensor)))


# ---- what an optimizer steps on in a tensor's place: under DeepSpeed a float32 copy that is divided among the processes


def is_stepped_apart(tensor: Any) -> bool:
    """Whether that is another tensor than this, which then keeps no gradient until the step."""
    return deepspeed.is_stepped(tensor)


def stepped(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of it; `local` where it is the tensor itself."""
    return deepspeed.master(tensor) if deepspeed.is_stepped(tensor) else local(tensor)


def gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """Its gradient, or this process's part of that."""
    return deepspeed.gradient(tensor) if deepspeed.is_stepped(tensor) else tensor.grad


# Of whole weights; where they are stepped apart, or cut up, every process must ask.


def whole_master(tensor: torch.Tensor) -> torch.Tensor:
    """All of what an optimizer steps on in its place; the tensor itself where that is it."""
    return deepspeed.whole_master(tensor) if deepspeed.is_stepped(tensor) else whole(tensor.detach())


def whole_gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """All of its gradient, just before a step."""
    if deepspeed.is_stepped(tensor):
        return deepspeed.whole_gradient(tensor)
    return None if tensor.grad is None else whole(tensor.grad)


def set_gradient(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Steps by this in the place of the gradient there is."""
    if deepspeed.is_stepped(tensor):
        deepspeed.set_gradient(tensor, value)
    elif tensor.grad is not None:
        put(tensor.grad, value)


@contextmanager
def states_of(optimizer: Any, tensor: torch.Tensor) -> Iterator[dict[str, Any]]:
    """The optimizer's states of it; what is done inside to those of its own shape holds."""
    if isinstance(optimizer, DividedOptimizer):
        with optimizer.states_of(tensor) as found:
            yield found
        return
    held = optimizer.state.get(tensor, {})
    parts = {key: whole(value) for key, value in held.items() if is_cut(value)}
    yield parts or held
    for key, value in parts.items():
        put(held[key], value)


def overwritten(tensor: torch.Tensor) -> None:
    """Something else was put into the tensor, which whatever is stepped on in its place takes over."""
    if deepspeed.is_stepped(tensor):
        deepspeed.overwritten(tensor)
