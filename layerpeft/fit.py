"""The largest choice that fits into a given memory, and what it gives up."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from layerpeft.configs import LayerLoraConfig
from layerpeft.errors import ConfigError
from layerpeft.plan import Plan, plan, size_text
from layerpeft.selection import Select

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Fit:
    """A config that fits, its plan, and in words what was given up to get there."""

    config: LayerLoraConfig
    plan: Plan
    batch_size: int
    checkpointing: bool
    gave_up: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"gives up: {text}" for text in self.gave_up] or ["fits as it is"]
        return f"{self.plan}\n" + "\n".join(lines)


def fit(
    model: nn.Module | str | Path,
    config: LayerLoraConfig,
    limit: int | str,
    *,
    batch_size: int = 8,
    length: int = 512,
    optimizer: str = "adamw_torch",
    checkpointing: bool = False,
) -> Fit:
    """The first of these that fits into `limit` bytes (or "24GB"): as asked, with checkpointing, fewer rows at a time, a lower
    rank, fewer layers. Each step keeps the ones before it.

    Raises: ConfigError when one layer at rank 4, one row at a time, is still too large; it says by how much.
    """
    room = _bytes(limit)
    last: Plan | None = None
    for trial, rows, recompute, gave_up in _trials(model, config, batch_size, checkpointing):
        last = plan(model, trial, batch_size=rows, length=length, optimizer=optimizer, checkpointing=recompute)
        if last.peak_bytes <= room:
            return Fit(trial, last, rows, recompute, gave_up)
    assert last is not None
    raise ConfigError(
        f"nothing fits into {size_text(room)}: one layer at rank {min(4, config.r)}, one row at a time, with checkpointing, "
        f"takes {size_text(last.peak_bytes)}, {size_text(last.parts['weights'])} of it weights. Shorten the rows, or load the "
        "base in 4 bit."
    )


def _trials(
    model: nn.Module | str | Path, config: LayerLoraConfig, batch_size: int, checkpointing: bool
) -> Iterator[tuple[LayerLoraConfig, int, bool, tuple[str, ...]]]:
    given: list[str] = []
    yield config, batch_size, checkpointing, ()
    if not checkpointing:
        given.append("time: blocks are recomputed in the backward pass (gradient_checkpointing)")
        yield config, batch_size, True, tuple(given)
    rows, rank = batch_size, config.r
    while rows > 1:
        rows //= 2
        yield config, rows, True, (*given, _fewer_rows(rows, batch_size))
    given += [_fewer_rows(rows, batch_size)] if rows < batch_size else []
    trial = config
    while rank > 4:
        rank //= 2
        trial = copy.deepcopy(config)
        trial.r = rank
        yield trial, rows, True, (*given, f"rank {rank} instead of {config.r}")
    given = [*given, f"rank {rank} instead of {config.r}"] if rank < config.r else given
    chosen = [row.layer for row in plan(model, config, batch_size=1, length=8).rows if row.trains]
    for count in range(len(chosen) - 1, 0, -1):
        fewer = copy.deepcopy(trial)
        fewer.select = _fewer(config, chosen, count)
        fewer = LayerLoraConfig(**_fields(fewer))
        yield fewer, rows, True, (*given, f"{count} instead of {len(chosen)} layers")


def _fewer(config: LayerLoraConfig, chosen: list[int], count: int) -> Any:
    """The same choice with `count` layers: the score's best, or those nearest to the output."""
    select = Select.parse(config.select)
    if select.keep is not None:
        return select.to_dict() | {"keep": count}
    return {"layers": chosen[-count:]} | ({"stack": select.stack} if select.stack else {})


def _fewer_rows(rows: int, asked: int) -> str:
    return f"{rows} instead of {asked} rows at a time (gradient accumulation makes the same step of them)"


def _fields(config: LayerLoraConfig) -> dict[str, Any]:
    return {
        name: getattr(config, name)
        for name, field in config.__dataclass_fields__.items()
        if field.init and name not in ("peft_type", "batches")
    }


def _bytes(limit: int | str) -> int:
    if isinstance(limit, int):
        return limit
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", limit)
    unit = UNITS.get(found[2].upper() or "B") if found else None
    if not found or unit is None:
        raise ConfigError(f"{limit!r} is no size; write 24GB, 16GiB or a number of bytes")
    return int(float(found[1]) * unit)
