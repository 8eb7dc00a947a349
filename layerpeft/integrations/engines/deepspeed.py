"""DeepSpeed's ZeRO: stage 1 divides the optimizer's states among the processes, 2 gradients as well, 3 weights too.

Nothing here imports DeepSpeed; what it has made its own is told by the marks that it leaves on tensors.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from layerpeft.errors import SaveError
from layerpeft.integrations.engines.engine import (
    DISTILL,
    HEADS,
    RATES,
    SCALES,
    SINGLE,
    VIEWS,
    Engine,
    launched,
)
from layerpeft.integrations.files import read_json

_HF = "transformers.integrations.deepspeed"
LATE = (
    "{name} has divided the whole pool among the processes before the first step shows which layers to choose; pass batches=… "
    "(to the config or to get_peft_model), or scores that were saved before (score_layers, by: scores.json), or launch with "
    "ZeRO-2, FSDP2 or DDP"
)
FOR_GOOD = (
    "layers cannot change while training under {name}, which divides weights and optimizer among the processes for good; use "
    "DDP or ZeRO-2, or fully_shard in a loop of your own, or a choice that is made once"
)
NO_FOLD = (
    "a fold of gradient projection goes into whole weights, and under {name} a process holds a part of each only; use FSDP2, "
    "ZeRO-2 or DDP, or LayerLoraConfig"
)
PACKED = (
    "{name} divides no weights that are packed in fewer bits; use ZeRO-2, FSDP2 or DDP, or load the weights in 16 bit"
)


def stage(args: Any = None) -> int:
    """The stage of ZeRO that training arguments (or what has their attributes), `accelerate launch` or a config that transformers
    has read ask for; 0 where none does."""
    config = _asked(args)
    part = config.get("zero_optimization") if isinstance(config, Mapping) else None
    found = part.get("stage", 0) if isinstance(part, Mapping) else 0
    return int(found) if str(found).isdigit() else 0


def _asked(args: Any) -> Any:
    given = getattr(args, "deepspeed", None)
    if given:
        return given if isinstance(given, Mapping) else _read(given)
    if launched("DEEPSPEED"):
        path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        number = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return {"zero_optimization": {"stage": number}} if path == "none" else _read(path)
    known = getattr(sys.modules.get(_HF), "_hf_deepspeed_config_weak_ref", None)
    return getattr(known() if known is not None else None, "config", None)


def _read(path: Any) -> Any:
    try:
        return read_json(path)
    except SaveError:
        return None  # which DeepSpeed complains of


# ---- tensors


def is_part(tensor: Any) -> bool:
    """Whether stage 3 has divided it."""
    return getattr(tensor, "ds_tensor", None) is not None


def is_stepped(tensor: Any) -> bool:
    """Whether DeepSpeed steps in its place, on a float32 copy of which each process holds a part, and takes its gradient away."""
    return hasattr(tensor, "_hp_mapping") or (hasattr(tensor, "_z3_optimizer") and tensor.requires_grad)


def master(tensor: Any) -> torch.Tensor:
    """This process's part of that copy; nothing where it has none."""
    if is_part(tensor):
        return tensor._z3_optimizer.get_local_fp32_param(tensor)
    mapped = tensor._hp_mapping
    return torch.empty(0) if mapped is None else mapped.hp_fragment


def gradient(tensor: Any) -> torch.Tensor | None:
    """This process's part of the gradient, between a backward pass and the step; zeros where none arrived."""
    if is_part(tensor):
        return tensor._z3_optimizer.get_local_fp32_grad_for_param(tensor)
    if tensor._hp_mapping is None:
        return None
    try:
        return tensor._hp_mapping.get_lp_grad_fragment(tensor._index_in_param_group)
    except ValueError:
        return None


# Of a whole tensor, in stages 1 and 2. Every process must ask.


def whole_master(tensor: Any) -> torch.Tensor:
    """The float32 copy."""
    return tensor.get_full_hp_param()


def whole_gradient(tensor: Any) -> torch.Tensor:
    """The gradient, between a backward pass and the step."""
    return tensor.get_full_hp_grad()


def set_gradient(tensor: Any, value: torch.Tensor) -> None:
    """Puts another gradient in its place."""
    tensor.set_full_hp_grad(value)


def overwritten(tensor: Any) -> None:
    """The float32 copy takes over what was put into the tensor."""
    if tensor._hp_mapping is not None:
        tensor._hp_mapping.update_hp()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that stage 3 has divided; every process must ask."""
    with gathered([tensor]):
        return tensor.detach().clone()


def rewritten(tensor: Any) -> None:
    """What stage 3 keeps whole (small weights) is put together anew from its parts."""
    if tensor.ds_status.name == "AVAILABLE":
        tensor.partition(has_been_updated=False)
        tensor.all_gather()


@contextmanager
def gathered(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, those of them that stage 3 has divided are whole, to be read; every process must come here."""
    parts = [t for t in tensors if is_part(t)]
    if not parts:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(parts):
        yield


def _engine(number: int, **more: Any) -> Engine:
    parts = ("states", "gradients", "weights")[:number]
    return Engine(
        key=f"zero{number}",
        name=f"DeepSpeed ZeRO-{number}",
        argument="deepspeed",
        asked=lambda args: stage(args) == number,
        divides=frozenset(parts),  # type: ignore[arg-type]
        **more,
    )


ZERO1, ZERO2 = (_engine(i, cannot={"rates": RATES, "distill": DISTILL, "expert_views": VIEWS}) for i in (1, 2))
ZERO3 = _engine(
    3,
    is_part=is_part,
    local=lambda t: t.ds_tensor,
    whole=whole,
    cannot={
        "wait": LATE,
        "schedule": FOR_GOOD,
        "projection": NO_FOLD,
        "packed": PACKED,
        "rates": RATES,
        "heads": HEADS,
        "distill": DISTILL,
        "scales": SCALES,
        "single_experts": SINGLE,
        "expert_views": SINGLE,
    },
)
ZERO = (ZERO1, ZERO2, ZERO3)
