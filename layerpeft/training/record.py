"""What hangs on a live adapter's config, and the record of it that lies beside the saved adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from layerpeft.integrations.engines.engine import Need
from layerpeft.integrations.files import as_written, set_aside
from layerpeft.integrations.hub import license_of
from layerpeft.model.layers import base_of
from layerpeft.saving.card import write_card
from layerpeft.saving.manifest import BITS, MANIFEST, PICTURES, write_manifest
from layerpeft.saving.naming import named
from layerpeft.saving.owned import strangers
from layerpeft.selection.select import Selection
from layerpeft.text import note
from layerpeft.training import pictures, report
from layerpeft.training.method import Method
from layerpeft.training.report import LayerReport

HEAD = ("pad_token_id", "problem_type")  # of a config, besides the names of the classes
LETTERS = ("vocab_size", "pad_token_id", "ctc_loss_reduction")  # of the config of a model that spells


class Part(Protocol):
    """A part of a record, which says itself what is saved of it."""

    def save(self, folder: str, found: LayerReport) -> dict[str, Any]:
        """Writes its files beside the adapter, of which `found` is the report; what the manifest says of it."""
        ...


class Table:
    """The layers of a choice that is made once, as a table and a picture."""

    def save(self, folder: str, found: LayerReport) -> dict[str, Any]:
        """`layers.csv`, `layers.png`."""
        table, picture = (os.path.join(folder, name) for name in PICTURES)
        pictures.write_csv(found.rows, table, found.unit)
        pictures.write_png(found.rows, picture, found.why, found.unit)
        return {}


@dataclass
class Record:
    """The choice (None while it is pending), what has trained so far, and what else there is to save.

    `asked`: the config as it was given, without batches; None of an adapter that was read from a folder.
    """

    config: dict[str, Any]
    method: str
    selection: Selection | None = None
    steps_trained: dict[int, int] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    new_tensors: tuple[str, ...] = ()
    idle_experts: tuple[str, ...] = ()
    needs: frozenset[Need] = frozenset()  # what an engine must be able to do
    rows: Mapping[str, Any] | None = None  # what became of a recipe's rows
    dropped: Mapping[str, Any] | None = None  # what a recipe has taken out of the base before
    task: Mapping[str, Any] | None = None  # what a recipe has trained it for
    quantized: Any = None  # what is stored in which precision
    distilling: Any = field(default=None, compare=False, repr=False)  # what a teacher says beside training
    prefix: Any = field(
        default=None, compare=False, repr=False
    )  # what is kept of rows below the lowest layer that trains
    schedule: Any = None  # of a choice that is made again: what knows where it stands
    asked: Any = field(default=None, compare=False, repr=False)
    bound: Method | None = field(default=None, compare=False, repr=False)  # to the model and the adapter
    quantize: Callable[[nn.Module, Selection], Any] | None = field(default=None, compare=False, repr=False)

    reported: LayerReport | None = field(default=None, compare=False, repr=False)  # of the weights as they stand

    @property
    def parts(self) -> list[Part]:
        """All that is saved besides the choice itself."""
        parts: list[Part | None] = [self.bound, self.schedule or Table(), self.quantized]
        return [part for part in parts if part is not None]

    @property
    def precisions(self) -> dict[str, str]:
        """Full name -> precision of the linears that are stored in fewer bits, and how they are packed."""
        return self.quantized.precisions if self.quantized is not None else {}

    def twin(self, bound: Method) -> Record:
        """That of a copy of the adapter, which goes on by itself."""
        steps, checks = dict(self.steps_trained), dict(self.checks)
        taught = None if self.distilling is None else self.distilling.twin()
        kept = None if self.prefix is None else self.prefix.twin()
        return replace(
            self, steps_trained=steps, checks=checks, bound=bound, schedule=None, distilling=taught, prefix=kept
        )

    def settle(self, model: nn.Module, selection: Selection) -> None:
        """The choice is made. Raises: QuantizationError where precisions hang on it, and cannot be had."""
        self.selection = selection
        if self.quantize is not None:
            self.quantized = self.quantize(model, selection)


def record_of(config: Any) -> Record | None:
    """The record that hangs on a live config of an adapter; None where nothing was chosen."""
    return getattr(config, "_layerpeft", None)


@contextmanager
def as_reported(record: Record | None, found: LayerReport) -> Iterator[None]:
    """Inside, weights stand as they were reported on, and what is written need not be measured again."""
    if record is None:
        yield
        return
    record.reported = found
    try:
        yield
    finally:
        record.reported = None


def write_record(folder: str | os.PathLike[str], model: nn.Module, record: Record, adapter: str) -> None:
    """The files of every part, then the manifest `layerpeft.json` over all files of the adapter."""
    assert record.selection is not None
    found = record.reported or report.layer_report(model, adapter)
    said: dict[str, Any] = {}
    theirs = strangers(Path(folder), (*PICTURES, BITS))
    with set_aside(Path(folder, name) for name in theirs):
        for part in record.parts:
            said |= part.save(os.fspath(folder), found)
    if theirs:
        note(f"{', '.join(theirs)} in {folder} was not written by layerpeft, and is left as it is")
    write_manifest(
        folder,
        said
        | {
            "method": record.method,
            "selection": record.selection.to_dict(),
            "config": record.config,
            "report": [vars(r) if hasattr(r, "__dict__") else r for r in found.rows],
            "new_tensors": list(record.new_tensors),
            "idle_experts": list(record.idle_experts),
            "checks": record.checks,
            "rows": record.rows,
            "dropped": record.dropped,
            "task": record.task,
            "head": head_of(model),
            "base": base_named(model),
        },
        theirs,
    )
    write_card(Path(folder))


def base_named(model: nn.Module) -> dict[str, Any] | None:
    """What is said of the model under an adapter: its name, and what the hub says of it; None where it has no name."""
    config: Any = getattr(base_of(model), "config", None)
    place = getattr(config, "_name_or_path", None)
    if not place:
        return None
    found = named(place)
    revision = found.revision or getattr(config, "_commit_hash", None)
    return {
        "name": found.name,
        "local": found.local,
        "revision": None if found.local else revision,
        "license": license_of(place if found.local else found.name, revision),
    }


def head_of(model: nn.Module) -> dict[str, Any] | None:
    """What the config of a classifier, or of a model that spells, says of its head; None of any other model."""
    config: Any = getattr(model, "config", None)
    if type(model).__name__.endswith("ForCTC"):
        return {k: getattr(config, k, None) for k in LETTERS}
    names = getattr(config, "id2label", None)
    if not names or "Classification" not in type(model).__name__:
        return None
    return {"id2label": {str(i): name for i, name in names.items()}} | {k: getattr(config, k, None) for k in HEAD}


def read_record(manifest: Mapping[str, Any]) -> Record:
    """The record of a saved choice, as it hangs on a live adapter config. Raises: SaveError where it is not one."""
    with as_written(f"{MANIFEST} is not what was written"):
        selection = manifest["selection"]
        return Record(
            selection=None if selection is None else Selection.from_dict(selection),
            config=dict(manifest["config"]),
            method=manifest["method"],
            steps_trained={int(row["layer"]): int(row["steps"]) for row in manifest["report"] if row.get("steps")},
            checks=dict(manifest.get("checks") or {}),
            new_tensors=tuple(manifest.get("new_tensors") or ()),
            idle_experts=tuple(manifest.get("idle_experts") or ()),
            rows=manifest.get("rows"),
            dropped=manifest.get("dropped"),
            task=manifest.get("task"),
        )
