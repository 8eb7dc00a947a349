"""torch's fully sharded data parallel: FSDP2 (`fully_shard`), through Accelerate or in a loop of one's own, and the old FSDP1."""

import os
from typing import Any

import torch

from layerpeft.errors import SaveError
from layerpeft.integrations.engines.engine import FIXED, Engine, launched
from layerpeft.integrations.files import read_json


def _version(args: Any) -> int | None:
    """Which one is asked for; None where none is. On CPUs Accelerate runs DDP in its place."""
    if getattr(args, "use_cpu", False) or launched("CPU"):
        return None
    if not getattr(args, "fsdp", None):
        return int(os.environ.get("FSDP_VERSION", "1")) if launched("FSDP") else None
    given = getattr(args, "fsdp_config", None) or {}
    if not isinstance(given, dict):
        try:
            given = read_json(given)
        except SaveError:
            given = {}
    return int(given.get("version", given.get("fsdp_version", 2)))


def _cut_like(whole: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    here = whole.to(like.to_local().device, like.dtype)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


_ALL = frozenset(("weights", "gradients", "states"))
FSDP1 = Engine(
    key="fsdp1",
    name="FSDP",
    argument="fsdp",
    asked=lambda args: _version(args) == 1,
    divides=_ALL,
    cannot={"schedule": FIXED},
)
FSDP2 = Engine(
    key="fsdp2",
    name="FSDP2",
    argument="fsdp",
    asked=lambda args: _version(args) == 2,
    divides=_ALL,
    is_part=lambda t: hasattr(t, "to_local"),
    local=lambda t: t.to_local(),  # type: ignore[attr-defined]
    whole=lambda t: t.full_tensor(),  # type: ignore[attr-defined]
    cut_like=_cut_like,
)
