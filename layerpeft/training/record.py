"""What hangs on a live adapter's config, and the record of it that lies beside the saved adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from layerpeft.quantization.picture import write_bits
from layerpeft.saving.manifest import BITS, PICTURES, write_manifest
from layerpeft.selection.select import Selection
from layerpeft.training import pictures, report


def write_record(folder: str | os.PathLike[str], model: nn.Module, record: LiveRecord, adapter: str) -> None:
    """`layers.csv`, `layers.png`, then the manifest `layerpeft.json` over all files of the adapter."""
    assert record.selection is not None
    found = report.layer_report(model, adapter)
    table, picture = (os.path.join(folder, name) for name in PICTURES)
    if record.masters is not None:
        record.masters.save(folder)
    scheduled, names, why = {}, record.selection.layer_names, record.selection.why
    if record.schedule is None:
        pictures.write_csv(found.rows, table)
        pictures.write_png(found.rows, picture, why)
    else:
        record.schedule.save(folder)
        scheduled = {"schedule": record.schedule.plain()}
        pictures.write_switches(scheduled["schedule"], names, found.rows, table)
        pictures.write_heatmap(scheduled["schedule"], names, picture, why)
    stored: dict[str, Any] = {}
    if record.quantized is not None:
        write_bits(record.quantized, os.path.join(folder, BITS))
        stored = {"quant": record.quantized.to_dict()}
    write_manifest(
        folder,
        scheduled
        | stored
        | {
            "method": record.method,
            "selection": record.selection.to_dict(),
            "config": record.config,
            "report": [vars(r) if hasattr(r, "__dict__") else r for r in found.rows],
            "new_tensors": list(record.new_tensors),
            "idle_experts": list(record.idle_experts),
            "checks": record.checks,
        },
    )


def _live_record(manifest: Mapping[str, Any]) -> LiveRecord:
    """The record of a saved choice, as it hangs on a live adapter config."""
    selection = manifest["selection"]
    return LiveRecord(
        selection=None if selection is None else Selection.from_dict(selection),
        config=dict(manifest["config"]),
        method=manifest["method"],
        steps_trained={int(row["layer"]): int(row["steps"]) for row in manifest["report"] if row.get("steps")},
        checks=dict(manifest.get("checks") or {}),
        new_tensors=tuple(manifest.get("new_tensors") or ()),
        idle_experts=tuple(manifest.get("idle_experts") or ()),
    )


@dataclass
class LiveRecord:
    """What hangs on a live adapter's config: the choice (None while it is pending), and what has trained so far."""

    config: dict[str, Any]
    method: str = "lora"
    selection: Selection | None = None
    steps_trained: dict[int, int] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    new_tensors: tuple[str, ...] = ()
    idle_experts: tuple[str, ...] = ()
    masters: Any = None  # what keeps float32 masters, and saves them
    quantized: Any = None  # what is stored in which precision
    schedule: Any = None  # of a choice that is made again: what knows where it stands

    @property
    def precisions(self) -> dict[str, str]:
        """Full name -> precision of the linears that are stored in fewer bits, and how they are packed."""
        if self.quantized is None or not self.quantized.assignment:
            return {}
        return {**self.quantized.assignment, "(packing)": str(self.quantized.storage)}
