"""layerpeft: gradient projection on some layers, by any optimizer; nothing but the projected linears trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

import layerpeft
from benchmarks.arm import Ready, Unavailable, adamw
from benchmarks.count import optimizer_bytes, size, tensors_in
from benchmarks.model import LINEARS
from layerpeft.training.follower import followers_of
from layerpeft.tuners.galore.projection import fixed_of, projections, state_of, trained_of


@dataclass(frozen=True)
class Options:
    """`LayerGaloreConfig`'s own words, with its defaults; and the precision of layers that do not train."""

    select: Any = "all"
    r: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "right"
    subspace: Literal["sketch", "svd", "random"] = "sketch"
    stagger: bool = True
    seed: int = 0
    quantize_frozen: str | None = None


def config(options: Options, count: int) -> layerpeft.LayerGaloreConfig:
    """The config."""
    return layerpeft.LayerGaloreConfig(
        r=options.r,
        update_proj_gap=options.update_proj_gap,
        scale=options.scale,
        proj_type=options.proj_type,
        subspace=options.subspace,
        stagger=options.stagger,
        seed=options.seed,
        select=options.select,
        quantize_frozen=options.quantize_frozen,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """Our wrapping, AdamW. Raises: Unavailable where tensors have no values, since bases are made from values."""
    if traced:
        raise Unavailable("cannot be traced")
    wrapped: Any = layerpeft.get_peft_model(model, config(options, 0))
    optimizer = adamw(wrapped)
    return Ready(
        wrapped,
        optimizer,
        refresh=None if options.stagger else lambda: fall_due(wrapped),
        state=lambda: state_bytes(wrapped, optimizer),
        folds=lambda: min(state_of(layer).folds.count for _, layer in projected(wrapped)),
    )


def projected(wrapped: Any) -> Iterator[tuple[str, Any]]:
    """The projected modules, by name."""
    return projections(wrapped.base_model.model, "default")


def fall_due(wrapped: Any) -> None:
    """Makes every projection fall due in the next step."""
    states = [state_of(layer) for _, layer in projected(wrapped)]
    for state in states:
        state.due = state.steps
    for follower in followers_of(wrapped):
        follower.method.ready()


def state_bytes(wrapped: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes by part. Ω and the sketches are there from the backward pass of a step that takes them to its end."""
    layers = [layer for _, layer in projected(wrapped)]
    states = [state_of(layer) for layer in layers]
    own = {p.untyped_storage()._cdata for p in wrapped.parameters()}
    seen = tensors_in(states[0].watcher._seen) if states[0].watcher is not None else []
    return {
        "trained": size(trained_of(layer) for layer in layers),
        "basis": size(fixed_of(layer) for layer in layers),
        "sketching": size(t for t in seen if t.untyped_storage()._cdata not in own),
        "moments": optimizer_bytes(optimizer, wrapped),
        "originals": size(state.original for state in states if state.original is not None),
        "folds": sum(state.folds.nbytes for state in states),
    }
