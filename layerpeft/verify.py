"""Is what trains what was asked for: gradients, optimizer, movement, and a base that stays where it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

Parameters = Mapping[str, Mapping[str, nn.Parameter]]  # target -> the adapter's tensors in it
BLOCK = 1 << 14


def checksum(t: torch.Tensor) -> int:
    """A number that changes when any bit of the tensor does (sums of its bytes, weighted by place); no copy of the tensor."""
    data = t.detach()
    if data.device.type == "meta" or not data.numel():
        return 0
    data = data.contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 8 * 8
    total = int(data[whole:].long().sum()) if whole < data.numel() else 0
    words = data[:whole]
    words = words.view(torch.int64) if words.storage_offset() % 8 == 0 else words.clone().view(torch.int64)
    blocks = words.numel() // BLOCK
    sums = [words[: blocks * BLOCK].view(blocks, BLOCK).sum(1), words[blocks * BLOCK :].sum().view(1)]
    joined = torch.cat(sums) if blocks else sums[1]
    places = torch.arange(1, 2 * joined.numel(), 2, device=joined.device)
    return int((joined * places).sum()) ^ (total << 1)


def checksums(model: nn.Module, among: Iterable[str] | None = None) -> dict[str, int]:
    """Checksums of all parameters that do not require a gradient, or of those named."""
    wanted = None if among is None else set(among)
    return {
        n: checksum(p) for n, p in model.named_parameters() if (not p.requires_grad if wanted is None else n in wanted)
    }


def before_step(tensors: Parameters, in_optimizer: set[int]) -> tuple[list[str], list[str]]:
    """(faults, idle experts) before an optimizer step: every target needs finite gradients and all its tensors in an optimizer."""
    faults: list[str] = []
    idle: list[str] = []
    for target, group in tensors.items():
        missing = [n for n, p in group.items() if id(p) not in in_optimizer]
        grads = [p.grad for p in group.values() if p.grad is not None]
        if missing:
            faults.append(f"{target}: not in the optimizer: {', '.join(missing)}")
        if not grads:
            if "expert" in target:
                idle.append(target)
            else:
                faults.append(f"{target}: no gradient arrived")
        elif not all(bool(torch.isfinite(g).all()) for g in grads):
            faults.append(f"{target}: its gradient is not finite")
    return faults, idle


def snapshot(tensors: Parameters) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the adapter's tensors."""
    return {t: {n: p.detach().clone() for n, p in group.items()} for t, group in tensors.items()}


def unmoved(tensors: Parameters, before: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    """Targets of which no tensor differs from the snapshot."""
    return [t for t, group in tensors.items() if all(torch.equal(p.detach(), before[t][n]) for n, p in group.items())]


def why_unmoved(group: Mapping[str, nn.Parameter], rate: float) -> str:
    """The likely cause of a target that did not move, and the cure."""
    low = [n for n, p in group.items() if p.dtype in (torch.bfloat16, torch.float16)]
    grads = [p.grad for p in group.values() if p.grad is not None]
    if low and any(bool(g.any()) for g in grads):
        dtype = str(next(iter(group.values())).dtype).removeprefix("torch.")
        return (
            f"its updates (learning rate {rate:.1e}) round to nothing in {dtype}; keep the trained tensors in float32 "
            "(autocast_adapter_dtype=True) or raise the learning rate"
        )
    if grads and not any(bool(g.any()) for g in grads):
        return "its gradient is exactly zero: the loss does not depend on it"
    return "the optimizer did not change it: look for a learning rate of zero in its group"


def learning_rate(optimizer: torch.optim.Optimizer, ids: set[int]) -> float:
    """The largest learning rate among the groups that hold one of these tensors."""
    rates = [float(g["lr"]) for g in optimizer.param_groups if any(id(p) in ids for p in g["params"])]
    return max((r for r in rates if math.isfinite(r)), default=0.0)
