"""What an engine gathers and reduces in a step of two real processes, by arm, beside what a plan says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import ranks, table
from benchmarks.arm import ARMS, read_arms
from benchmarks.case import Case
from benchmarks.model import DTYPES, Batch, Model, build, num_layers
from benchmarks.model import check as check_model
from layerpeft.errors import Problems, unknown
from layerpeft.planning.engines import cards
from layerpeft.planning.plan import for_cards
from layerpeft.planning.trace import Step
from layerpeft.selection import plugins

Say = Callable[[str], None]
MOVED = ("forward", "backward", "reduced")
TITLES = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "fsdp2_whole": "FSDP2, frozen blocks whole",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}


@dataclass(frozen=True)
class Options:
    """The arms' models, under each of the engines."""

    model: Model
    batch: Batch
    arms: Mapping[str, Any]
    engines: Sequence[str] = ranks.ENGINES
    seed: int = 0


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)
    for arm in read_arms(options.arms, problems):
        if not hasattr(plugins.get(ARMS, arm.name), "config"):
            problems.add(f"arms.{arm.label}: {arm.name} has no config")
    for name in options.engines:
        if name not in ranks.ENGINES:
            problems.add(f"engines: {unknown('engine', name, ranks.ENGINES)}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Times and elements by engine and arm."""
    options: Options = case.options
    arms = read_arms(options.arms, Problems(case.name))
    given = {label: {k: v for k, v in (row or {}).items() if k != "arm"} for label, row in options.arms.items()}
    rows: dict[str, Any] = {}
    for engine in options.engines:
        counted = ranks.in_two(engine, {a.label: (a.name, given[a.label]) for a in arms}, options.model, options.batch)
        rows[engine] = {arm.label: {"counted": counted[arm.label], **planned(engine, arm, options)} for arm in arms}
        say(f"{engine}: counted")
    return {"arms": {arm.label: arm.to_dict() for arm in arms}, "engines": rows}


def planned(engine: str, arm: Any, options: Options) -> dict[str, Any]:
    """What a plan says of an arm of this package: how often, and elements."""
    if arm.name != "layerpeft":
        return {}
    size = DTYPES[options.model.dtype].itemsize
    model = build(options.model, "meta")
    config = arm.module.config(arm.options, num_layers(model))
    small = cards(engine.removesuffix("_whole"), 2)
    small = replace(small, engine=replace(small.engine, persistent=0, reuse=0))
    given = {"batch_size": options.batch.rows, "length": options.batch.length, "optimizer": "adamw_torch"}
    (found,) = for_cards(model, config, [2], **given, checkpointing=True, step=Step(cards=small))
    moved = found.traffic
    said = {k: [getattr(moved, k).times, getattr(moved, k).bytes // size] for k in MOVED}
    if engine.endswith("_whole") and found.kept is not None:
        times, elements = said["backward"]
        said["backward"] = [times - found.kept.units, elements - found.kept.saved // size]
    return {"planned": said}


def tables(result: Mapping[str, Any]) -> str:
    """A line per engine and arm."""
    head = ["engine", "arm", "gathered, forward", "gathered, backward", "gradients reduced", "planned"]
    lines = []
    for engine, rows in result["engines"].items():
        for label, row in rows.items():
            found = [_text(row["counted"][key]) for key in MOVED]
            said = [_text(row["planned"][key]) for key in MOVED] if "planned" in row else []
            lines.append([TITLES[engine], f"`{label}`", *found, ", ".join(said)])
    return table.markdown(head, lines)


def _text(found: Sequence[int]) -> str:
    times, elements = found
    return f"{table.number_text(elements)} ({times}×)" if elements else "–"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing: the table says it."""
