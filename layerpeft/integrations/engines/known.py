"""The engines there are, which of them is asked for, and which a tensor belongs to."""

from typing import Any

import torch

from layerpeft.integrations.engines.deepspeed import ZERO
from layerpeft.integrations.engines.engine import Engine
from layerpeft.integrations.engines.fsdp import FSDP1, FSDP2

DDP = Engine(key="ddp", name="DDP", argument="", asked=lambda _: False)  # what runs where no other one is asked for
ENGINES = (ZERO, FSDP1, FSDP2, DDP)
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of such a tensor, in every process, each of which must ask; the tensor itself where it is not cut up."""
    return next((engine.whole(tensor) for engine in _CUTTING if engine.is_part(tensor)), tensor)
