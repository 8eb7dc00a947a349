"""How cost grows: operations and live bytes of one traced step, with layers, depth of the cut, rank and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import chart, table
from benchmarks.arm import Arm, read_arms
from benchmarks.case import Case
from benchmarks.model import SHAPES, Batch, Model
from benchmarks.model import check as check_model
from benchmarks.setting import Setting, prepare
from benchmarks.trace import traced
from layerpeft.errors import Problems

Say = Callable[[str], None]
AXES = {
    "layers": "layers that train, from the end",
    "depth": "lowest of four layers that train",
    "rank": "rank",
    "length": "tokens in a row",
}
DOUBLING = ("rank", "length")
FIELDS = {"layerpeft": "select", "peft_layers": "layers"}  # the option that says which layers


@dataclass(frozen=True)
class Options:
    """One step of each arm for every value of every sweep; what is not swept stands as in `arms` and `batch`."""

    model: Model
    batch: Batch
    arms: Mapping[str, Any]
    sweeps: Mapping[str, Any]
    setting: Setting = "checkpointed"


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)
    if options.model.shape is None:
        problems.add("model: growth is traced, and takes a shape")
    for arm in read_arms(options.arms, problems):
        if arm.name not in FIELDS:
            problems.add(f"arms.{arm.label}: {arm.name} takes no layers; those that do: {', '.join(FIELDS)}")
    for name, values in options.sweeps.items():
        if name not in AXES:
            problems.add(f"sweeps: {name!r} is not one of {', '.join(AXES)}")
        elif not isinstance(values, list) or not all(isinstance(v, int) for v in values) or not values:
            problems.add(f"sweeps.{name}: expected a list of whole numbers, got {values!r}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """The counts of every point, by sweep and arm."""
    options: Options = case.options
    arms = read_arms(options.arms, Problems(case.name))
    sweeps = {}
    for name, values in options.sweeps.items():
        points = [{"value": value, "arms": dict(_point(options, arms, name, value))} for value in values]
        sweeps[name] = {"axis": AXES[name], "doubling": name in DOUBLING, "points": points}
        say(f"{name}: {len(values)} points")
    return {"arms": {arm.label: arm.to_dict() for arm in arms}, "sweeps": sweeps}


def _point(options: Options, arms: list[Arm], name: str, value: int) -> Iterator[tuple[str, dict[str, int]]]:
    batch = replace(options.batch, length=value) if name == "length" else options.batch
    for arm in arms:
        changed = replace(arm.options, **_changes(name, value, FIELDS[arm.name], SHAPES[str(options.model.shape)]))
        counts = traced(replace(arm, options=changed), options.model, batch, lambda r: prepare(r, options.setting))
        yield arm.label, counts


def _changes(name: str, value: int, field: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    if name == "layers":
        return {field: f"last:{value}"}
    if name == "depth":
        return {field: f"{value}-{min(value + 3, shape['num_hidden_layers'] - 1)}"}
    return {"r": value} if name == "rank" else {}


def tables(result: Mapping[str, Any]) -> str:
    """One table per sweep: operations and peak live bytes of each arm."""
    parts = []
    for sweep in result["sweeps"].values():
        labels = list(sweep["points"][0]["arms"])
        head = [
            sweep["axis"],
            *(f"{label}: operations" for label in labels),
            *(f"{label}: peak live" for label in labels),
        ]
        lines = []
        for point in sweep["points"]:
            found = [point["arms"][label] for label in labels]
            flops = [f"{counts['flops'] / 1e12:.3g} × 10¹²" for counts in found]
            lines.append(
                [str(point["value"]), *flops, *(f"{counts['peak_bytes'] / 2**30:.2f} GiB" for counts in found)]
            )
        parts.append(table.markdown(head, lines))
    return "\n\n".join(parts)


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """One column per sweep."""
    return chart.lines(result["sweeps"], result["title"], path)
