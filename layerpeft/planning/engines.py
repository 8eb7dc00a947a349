"""What each engine divides among processes, by the defaults that `accelerate launch` starts it with: one row an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerpeft.errors import ConfigError, unknown

Held = Literal["weights", "gradients", "states"]


@dataclass(frozen=True)
class Engine:
    """`divides`: of what a card holds a part only; `gathers`: what of divided weights is whole at one time.

    `low`: what mixed precision makes of weights: nothing (autocast), trained ones in float32 and gathered in 16 bit ("gathered"),
    or all in 16 bit with float32 copies of those that train, divided like the states ("stored"). `every_pass`: gradients are
    reduced in every pass of a step, and not in its last one only. `bucket`: elements that gradients are put together in to be
    reduced, None for as many as train; `buckets`: how many of those there are; `scatters`: a card receives its part of a sum only.
    In elements: `persistent`, up to which a weight is whole for good; `reuse`, within which a weight that comes again stays whole;
    `early`, how many are gathered ahead.
    """

    name: str
    title: str
    divides: frozenset[Held] = frozenset()
    gathers: Literal["blocks", "modules"] | None = None
    low: Literal["autocast", "gathered", "stored"] = "autocast"
    every_pass: bool = False
    bucket: int | None = None
    buckets: int = 1
    scatters: bool = True
    persistent: int = 0
    reuse: int = 0
    early: int = 0


@dataclass(frozen=True)
class Cards:
    """How many there are, one process each, and the engine that they run under."""

    engine: Engine
    processes: int


BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size and allgather_bucket_size
# its stage3_param_persistence_threshold, stage3_max_reuse_distance, stage3_prefetch_bucket_size
STAGE3 = (100_000, 1_000_000_000, 50_000_000)
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("ddp", "DDP", scatters=False),
        Engine("fsdp2", "FSDP2", frozenset(("weights", "gradients", "states")), "blocks", "gathered"),
        Engine("zero1", "ZeRO-1", frozenset(("states",)), None, "stored", bucket=BUCKET),
        Engine("zero2", "ZeRO-2", frozenset(("gradients", "states")), None, "stored", True, BUCKET),
        Engine(
            "zero3",
            "ZeRO-3",
            frozenset(("weights", "gradients", "states")),
            "modules",
            "stored",
            True,
            BUCKET,
            1,
            True,
            *STAGE3,
        ),
    )
}


def cards(engine: str, processes: int) -> Cards:
    """Raises: ConfigError for an engine that there is not, or fewer than one process."""
    wrong = [] if engine in ENGINES else [unknown("engine", engine, ENGINES)]
    wrong += [f"processes={processes}: at least 1"] if processes < 1 else []
    if wrong:
        raise ConfigError(*wrong)
    return Cards(ENGINES[engine], processes)
