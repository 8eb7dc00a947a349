"""`Scores`: one finite number per layer, where it came from, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerpeft.errors import Problems, ScoreError
from layerpeft.integrations.files import read_json, replace_file
from layerpeft.model.layers import LayerMap
from layerpeft.selection.typecheck import read_fields

FORMAT = 1


@dataclass(frozen=True)
class Scores:
    """One finite number per layer of a stack (or smaller `unit`); higher means "train this first".

    `targets` holds the parts a layer's number was made from (same unit as the scorer documents), `fingerprint` the
    architecture it belongs to, `overlaps` (layers, layers) how much of the same each two of them do, where that was measured.
    """

    values: tuple[float, ...]
    by: str
    fingerprint: str
    stack: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "layer"
    overlaps: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        bad = [i for i, v in enumerate(self.values) if not math.isfinite(v)]
        if bad:
            raise ScoreError(
                f"{self.by}: the score is not finite for {self.unit}(s) {', '.join(map(str, bad))}. "
                "Look for overflow (fp16 without a loss scaler) or batches whose labels are all ignored."
            )

    def ranked(self) -> tuple[int, ...]:
        """Layer indices, best first; ties by index."""
        return tuple(sorted(range(len(self.values)), key=lambda i: (-self.values[i], i)))

    def check(self, layers: LayerMap) -> None:
        """Raises: ScoreError when these scores were made on another architecture or another stack."""
        problems = Problems(f"these {self.by} scores do not belong to this model")
        if self.unit != layers.unit:
            problems.add(f"they are of {self.unit}s, and the choice is among {layers.unit}s")
        elif len(self.values) != len(layers):
            problems.add(f"they hold {len(self.values)} {self.unit}s, the stack {layers.stack!r} has {len(layers)}")
        elif self.stack != layers.stack:
            problems.add(f"they were made on the stack {self.stack!r}, the choice is in {layers.stack!r}")
        elif self.fingerprint != layers.fingerprint:
            made_on = self.origin.get("model_type", "another model")
            problems.add(
                f"they were made on {made_on!r}: names or shapes of its targets differ from {layers.model_type!r}"
            )
        problems.raise_if_any(ScoreError)

    def to_dict(self) -> dict[str, Any]:
        plain = {"format": FORMAT, **asdict(self), "values": list(self.values)}
        if self.unit == "layer":
            del plain["unit"]
        overlaps = plain.pop("overlaps")
        return plain | {"overlaps": [list(row) for row in overlaps]} if overlaps else plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Raises: ScoreError when keys are missing, or the format is newer than this version reads."""
        given = read_fields(cls, data, ScoreError, "a scores file")
        if data.get("format") != FORMAT:
            raise ScoreError(f"not a scores file of format {FORMAT} (found {data.get('format')!r})")
        missing = {"values", "by", "fingerprint", "stack"} - set(given)
        if missing:
            raise ScoreError(f"a scores file needs the keys {', '.join(sorted(missing))}")
        overlaps = tuple(tuple(map(float, row)) for row in given.pop("overlaps", ()))
        if overlaps and any(len(row) != len(given["values"]) for row in (overlaps, *overlaps)):
            raise ScoreError("a scores file's overlaps need a row and a column for each layer")
        return cls(**{**given, "values": tuple(map(float, given["values"])), "overlaps": overlaps})

    def save(self, path: str | Path) -> None:
        """Writes the scores as JSON; a file that is there stays whole until the new one is."""
        replace_file(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads a JSON file of `save`, or the scores inside a `layerpeft.json`.

        Raises: ScoreError when the file is missing, no JSON, or holds no scores.
        """
        if not Path(path).is_file():
            raise ScoreError(f"no scores file at {path}")
        data = read_json(path, ScoreError, kind=object)
        if isinstance(data, dict) and isinstance(data.get("selection"), dict):
            data = data["selection"].get("scores")
        if not isinstance(data, dict):
            raise ScoreError(f"{path} holds no scores")
        return cls.from_dict(data)
