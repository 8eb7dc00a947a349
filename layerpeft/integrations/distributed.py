"""Several processes: who chooses, and how all of them hear of it. Device names appear here and nowhere else."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Number of processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 where there is no group."""
    return dist.get_rank() if world_size() > 1 else 0


def add_up(t: torch.Tensor) -> torch.Tensor:
    """Sum of `t` over all processes (on the CPU); every process must call it in the same order."""
    if world_size() == 1:
        return t
    moved = t.to(_group_device())
    dist.all_reduce(moved)
    return moved.cpu()


def everywhere(fact: bool) -> bool:
    """Whether every process says so; every process must ask."""
    return int(add_up(torch.tensor([int(fact)]))) == world_size()


def first_where(fact: bool) -> int | None:
    """The first process that says so, None where none does; every process must ask."""
    facts = torch.zeros(world_size(), dtype=torch.int64)
    facts[rank()] = int(fact)
    return next((i for i, n in enumerate(add_up(facts)) if n), None)


def agreed(facts: list[bool]) -> list[bool]:
    """Which of these facts hold in every process; every process must ask, with facts of the same things."""
    return [int(n) == world_size() for n in add_up(torch.tensor(facts, dtype=torch.int64))] if facts else []


@dataclass(frozen=True)
class Part:
    """This process's part of a tensor, on the CPU, and how the whole is cut up."""

    part: torch.Tensor
    mesh: Any
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]


def part_of(tensor: Any, part: torch.Tensor) -> Part:
    """`part` as that of a tensor that is cut up like this one."""
    return Part(part, tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())


def put_together(part: Part, device: torch.device) -> torch.Tensor:
    """The tensor that is cut up, as it was, on that device; without a mesh the part alone."""
    from torch.distributed.tensor import DTensor

    here = part.part.to(device, non_blocking=True)
    if part.mesh is None:
        return here
    options: dict[str, Any] = {"run_check": False, "shape": part.shape, "stride": part.stride}
    return DTensor.from_local(here, part.mesh, part.placements, **options)


def from_first(value: Any) -> Any:
    """What process 0 holds, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_group_device())
    return box[0]


def awaits_every_gradient() -> bool:
    """Whether the forward pass that runs now is inside a DDP that was not told to look for parameters without a gradient."""
    active: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return active is not None and (not active.find_unused_parameters or bool(getattr(active, "static_graph", False)))


def random_devices(devices: set[torch.device]) -> tuple[list[torch.device], str]:
    """The accelerators among `devices` whose random state has to be kept, and their type."""
    kept = [d for d in devices if d.type not in ("cpu", "meta")]
    return kept, kept[0].type if kept else "cuda"


def _group_device() -> torch.device:
    if "nccl" in str(dist.get_backend()) or "xccl" in str(dist.get_backend()):
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")
