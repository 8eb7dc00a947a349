"""torch's fully sharded data parallel: FSDP2 (`fully_shard`), through Accelerate or in a loop of one's own, and the old FSDP1."""

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule

from layerpeft.errors import SaveError
from layerpeft.integrations.engines.engine import DISTILL, FIXED, HEADS, RATES, SCALES, SINGLE, Engine, Need, launched
from layerpeft.integrations.files import read_json


def _version(args: Any) -> int | None:
    """Which one is asked for; None where none is. On CPUs Accelerate runs DDP in its place."""
    if getattr(args, "use_cpu", False) or launched("CPU"):
        return None
    if not getattr(args, "fsdp", None):
        return _running() or int(os.environ.get("FSDP_VERSION", "1")) if launched("FSDP") else None
    given = getattr(args, "fsdp_config", None) or {}
    if not isinstance(given, dict):
        try:
            given = read_json(given)
        except SaveError:
            given = {}
    return int(given.get("version", given.get("fsdp_version", 2)))


def _running() -> int | None:
    """That of the Accelerator that there is, whose plugin says in the environment that there is one, and not which."""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    return getattr(getattr(state, "_shared_state", {}).get("fsdp_plugin"), "fsdp_version", None)


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


def _gathering(model: nn.Module) -> list[FSDPModule]:
    """Those inside of it that gather weights, and those around it."""
    if not _module_state_mapping:  # asked at every step, and nothing is divided
        return []
    inside = [m for m in model.modules() if isinstance(m, FSDPModule)]
    others = [
        m for m in list(_module_state_mapping) if isinstance(m, FSDPModule) and all(m is not one for one in inside)
    ]
    return inside + [m for m in others if any(one is model for one in m.modules())]  # type: ignore[attr-defined]


def give_up(model: nn.Module) -> None:
    """Between steps: no weights stay gathered, as those outside of blocks do after a pass without gradients."""
    for module in _gathering(model):
        module.reshard()


def is_inside(model: nn.Module) -> bool:
    """Whether some of its weights are gathered for a pass, and hold no gradients of their own after it."""
    return bool(_gathering(model))


def is_cut_by_rows(tensor: Any) -> bool:
    """Whether each process holds some of its rows (along its first dimension), whole ones."""
    from torch.distributed.tensor import Replicate, Shard

    return all(type(p) is Replicate or type(p) is Shard and p.dim == 0 for p in getattr(tensor, "placements", ()))


def _cut_like(whole: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    here = whole.to(like.to_local().device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


EXPERTS = (
    "gradient projection of experts (target_parameters) keeps a basis for each of them, and {name} divides the experts of a module "
    "among the processes; use DDP or DeepSpeed ZeRO-2, or name linear layers"
)
LATE = (
    "{name} has divided the weights before the first step shows which layers to choose, and parts of weights cannot be packed in "
    "fewer bits; pass batches=… (to the config or to get_peft_model), or scores that were saved before (score_layers, by: "
    "scores.json), or use DDP"
)
OLD = (
    "{name} in its first version keeps weights in flat parts, in which layers cannot be told apart; use fsdp_version: 2"
)
NOT_TRIED: dict[Need, str] = {
    "rates": RATES,
    "heads": HEADS,
    "distill": DISTILL,
    "scales": SCALES,
    "single_experts": SINGLE,
    "expert_views": SINGLE,
}
_ALL = frozenset(("weights", "gradients", "states"))
FSDP1 = Engine(
    key="fsdp1",
    name="FSDP",
    argument="fsdp",
    asked=lambda args: _version(args) == 1,
    divides=_ALL,
    cannot={**NOT_TRIED, "schedule": FIXED, "wait": OLD, "projection": OLD},
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
    cannot={**NOT_TRIED, "projected_experts": EXPERTS, "packed_later": LATE},
)
