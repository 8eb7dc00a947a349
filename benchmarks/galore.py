"""The optimizer of the package `galore-torch`, over the groups that its authors use."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.arm import Unavailable
from benchmarks.count import optimizer_bytes, size, tensors_in


@dataclass(frozen=True)
class Projection:
    """The package's own words."""

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 1.0
    proj_type: str = "std"


def optimizer(model: nn.Module, projection: Projection, lr: float = 1e-4, rest: bool = True) -> torch.optim.Optimizer:
    """`GaLoreAdamW`: linears with "attn" or "mlp" in their name are projected; all other weights train as they are, or not at all.

    Raises: Unavailable without the package.
    """
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise Unavailable("needs the package galore-torch (pip install galore-torch)") from error
    chosen = {
        id(module.weight): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(key in name for key in ("attn", "mlp"))
    }
    others = [p for p in model.parameters() if id(p) not in chosen]
    for parameter in others:
        parameter.requires_grad_(rest)
    projected: Any = {
        "params": list(chosen.values()),
        **{key: getattr(projection, key) for key in Projection.__dataclass_fields__},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package calls itself deprecated
        groups: Any = [{"params": others}, projected] if rest else [projected]
        return GaLoreAdamW(groups, lr=lr)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Makes every projection fall due in the next step."""
    for state in optimizer.state.values():
        if "projector" in state:
            state["projector"].ortho_matrix = None


def state_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, int]:
    """Bytes by part: the projections, and all else that the optimizer holds."""
    basis = size(tensors_in([state["projector"] for state in optimizer.state.values() if "projector" in state]))
    return {"basis": basis, "moments": optimizer_bytes(optimizer, model) - basis}
