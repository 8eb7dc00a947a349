"""What a folder says of its run, read as leniently as it can be: whatever is missing, or no longer what it was, is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, SaveError
from layerpeft.integrations.files import as_written, read_json, read_text
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.picture import cells
from layerpeft.recipe.outcome import read_run
from layerpeft.recipe.page.charts import Points, Span, finite
from layerpeft.saving.instead import lacking
from layerpeft.saving.manifest import CONFIG, MANIFEST
from layerpeft.training.pictures import spans

STATE = "trainer_state.json"  # of a checkpoint, whose log it holds
COMPARISON = "compare.json"


@dataclass(frozen=True)
class Facts:
    """`config`: of the adapter; `manifest`, `run`, `comparison`: each empty where there is none; `log`: what trainers logged."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    comparison: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()

    @property
    def unit(self) -> str:
        """What was chosen."""
        return str((self.manifest.get("selection") or self.comparison).get("unit") or "layer")

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """One for every layer, or unit."""
        return list(self.manifest.get("report") or [])

    def curve(self, key: str) -> Points:
        """A number of the log over optimizer steps, one of each step."""
        found = {}
        for entry in self.log:
            step, value = finite(entry.get("step")), finite(entry.get(key))
            if step is not None and value is not None:
                found[step] = value
        return sorted(found.items())

    @property
    def schedule(self) -> tuple[list[Span], int]:
        """The windows of a choice that was made again, and how many steps there were; none of any other."""
        standing = self.manifest.get("schedule") or {}
        try:
            with as_written("no schedule"):
                found: list[Span] = (
                    [(a, b, layers, scores) for a, b, layers, scores, _ in spans(standing)] if standing else []
                )
                return found, int(standing.get("step") or 0)
        except SaveError:
            return [], 0

    @property
    def bits(self) -> tuple[list[str], dict[tuple[str, int], str], float] | None:
        """Kinds of linears, the precision of each in each layer, and the mean; None where nothing was packed."""
        if not self.manifest.get("quant"):
            return None
        try:
            found = Quantized.from_dict(self.manifest["quant"])
        except LayerpeftError:
            return None
        return (*cells(found), found.mean_bits)


def facts(folder: Path) -> Facts:
    """What lies in a folder. Raises: SaveError where that is neither an adapter nor a comparison."""
    if not any((folder / name).is_file() for name in (CONFIG, MANIFEST, COMPARISON)):
        raise SaveError(f"nothing to report: {lacking(folder, CONFIG, COMPARISON)}")
    name = folder.absolute().name
    config, manifest = (_read(folder / file) for file in (CONFIG, MANIFEST))
    comparison = _read(folder / COMPARISON)
    if not (config or manifest or comparison):
        raise SaveError(f"nothing to report: what lies in {folder} cannot be read, or is cut short")
    rows = manifest.get("report")
    if rows:
        manifest["report"] = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return Facts(
        f"{folder.absolute().parent.name}, {name}" if name.startswith("checkpoint-") else name,
        config,
        manifest,
        read_run(folder),
        comparison,
        _log(folder),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, finite=False)
    except SaveError:
        return {}


def _log(folder: Path) -> list[Mapping[str, Any]]:
    """Lines of the log that are whole; of a checkpoint those that its trainer has."""
    try:
        lines = read_text(folder / "log.jsonl", errors="replace").splitlines()
    except (OSError, ValueError):
        lines = []
    found = [line for line in map(_line, lines) if line is not None]
    return found or [line for line in _read(folder / STATE).get("log_history") or [] if isinstance(line, Mapping)]


def _line(text: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, Mapping) else None
