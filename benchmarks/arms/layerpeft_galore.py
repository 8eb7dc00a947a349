"""layerpeft: gradient projection on some layers, by any optimizer; nothing but the projected linears trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import layerpeft
from benchmarks.arm import Ready, Unavailable, adamw
from benchmarks.model import LINEARS


@dataclass(frozen=True)
class Options:
    """`LayerGaloreConfig`'s own words, with its defaults."""

    select: Any = "all"
    r: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "right"


def config(options: Options, count: int) -> layerpeft.LayerGaloreConfig:
    """The config."""
    return layerpeft.LayerGaloreConfig(
        r=options.r,
        update_proj_gap=options.update_proj_gap,
        scale=options.scale,
        proj_type=options.proj_type,
        select=options.select,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """Our wrapping, AdamW. Raises: Unavailable where tensors have no values, since bases are made from values."""
    if traced:
        raise Unavailable("cannot be traced")
    wrapped = layerpeft.get_peft_model(model, config(options, 0))
    return Ready(wrapped, adamw(wrapped))
