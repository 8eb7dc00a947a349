"""torch's fully sharded data parallel: FSDP2 (`fully_shard`), through Accelerate or in a loop of one's own, and the old FSDP1."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from layerpeft.errors import SaveError
from layerpeft.integrations.engines.engine import FIXED, HEADS, RATES, Engine, launched
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


def fetch_down_to(blocks: Iterable[nn.Module], before: list[nn.Module]) -> list[nn.Module]:
    """Lets the backward pass fetch no weights ahead once it has come to these blocks; those of `before` fetch as others do again.

    Each is told to fetch itself, which is whole by then. Returns the modules that were told.
    """
    sharded = ([m for m in (block, *block.children()) if isinstance(m, FSDPModule)] for block in blocks)
    now: list[nn.Module] = [found[0] for found in sharded if found]
    if [id(m) for m in now] != [id(m) for m in before]:
        for module in before:
            module.set_modules_to_backward_prefetch([])  # type: ignore[operator]
        for module in now:
            module.set_modules_to_backward_prefetch([module])  # type: ignore[operator]
    return now


def give_up(model: nn.Module) -> None:
    """Between steps: no weights stay gathered, as those outside of blocks do after a pass without gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _cut_like(whole: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    here = whole.to(like.to_local().device, like.dtype)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


NO_FOLD = (
    "a fold of gradient projection goes into whole weights, and under {name} a process holds a part of each only; use DDP or "
    "DeepSpeed ZeRO-2, or LayerLoraConfig"
)
LATE = (
    "{name} has divided the weights before the first step shows which layers to choose, and parts of weights cannot be packed in "
    "fewer bits; pass batches=… (to the config or to get_peft_model), or scores that were saved before (score_layers, by: "
    "scores.json), or use DDP"
)
OLD = (
    "{name} in its first version keeps weights in flat parts, in which layers cannot be told apart; use fsdp_version: 2"
)
_ALL = frozenset(("weights", "gradients", "states"))
FSDP1 = Engine(
    key="fsdp1",
    name="FSDP",
    argument="fsdp",
    asked=lambda args: _version(args) == 1,
    divides=_ALL,
    cannot={"schedule": FIXED, "wait": OLD, "projection": OLD, "rates": RATES, "heads": HEADS},
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
    cannot={"projection": NO_FOLD, "packed_later": LATE, "rates": RATES, "heads": HEADS},
)
