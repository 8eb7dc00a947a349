"""Runs of a comparison, kept as they end: one line of JSON each, so that a comparison that was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, RecipeError
from layerpeft.integrations.files import digest_of, fingerprint, parse_json, replace_file, versions_of
from layerpeft.recipe.comparing.entries import Entry
from layerpeft.recipe.comparing.names import group_of
from layerpeft.recipe.model import model_path
from layerpeft.recipe.recipe import to_yaml
from layerpeft.recipe.trainer import Setup

VERSIONS = ("layerpeft", "torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Run:
    """One trained model: its arm and layers, trainable parameters, the number on held-out rows that arms are compared by, seconds
    of training, all numbers; its training seed, steps and learning rate; whether the seconds are the processor's."""

    arm: str
    layers: tuple[int, ...]
    trainable: int
    value: float
    seconds: float
    numbers: Mapping[str, float]
    seed: int = 0
    steps: int = 0
    rate: float = 0.0
    processor: bool = False

    @property
    def group(self) -> str:
        """The arm, of which a draw is one run of several."""
        return group_of(self.arm)


class Kept:
    """The runs in a file, by what they were made of; each is written when it ends."""

    def __init__(self, path: Path) -> None:
        """Raises: RecipeError where something else lies there."""
        self.path, self.lines = path, _read(path)

    def has(self, key: str) -> bool:
        """Whether a run was made before."""
        return key in self.lines

    def get(self, key: str) -> tuple[Run, float | None] | None:
        """A run that was made before, and what the number was before training, where that was asked."""
        line = self.lines.get(key)
        if line is None:
            return None
        return Run(**{**line["run"], "layers": tuple(line["run"]["layers"])}), line["before"]

    def told(self) -> str:
        """What an interruption leaves."""
        if not self.lines:
            return "no run has ended yet"
        runs = f"{len(self.lines)} runs are" if len(self.lines) > 1 else "one run is"
        return f"{runs} in {self.path}; the same command goes on"

    def add(self, key: str, run: Run, before: float | None) -> None:
        """Writes one more."""
        line = json.loads(json.dumps({"key": key, "run": asdict(run), "before": before}))
        self.lines[key] = line | {"sha256": digest_of(line)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self.lines.values()).encode())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8") if path.exists() or path.is_symlink() else ""
        found = [parse_json(line, finite=False) for line in text.splitlines()]
    except (OSError, ValueError, LayerpeftError):
        found = [{}]
    if path.is_symlink() or any(line.get("sha256") != digest_of(line) or "key" not in line for line in found):
        raise RecipeError(
            f"output_dir: {path} holds what layerpeft did not write, or what was changed since, and would replace. Move it, or "
            "name another folder"
        )
    return {line["key"]: line for line in found}


@cache
def _content(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A digest of files, which is taken once for each state of them."""
    return digest_of({file.name: fingerprint(file) for file, _, _ in files})


def key_of(entry: Entry, setup: Setup) -> str:
    """What a run is made of: its recipe but for the folder, its layers, seed, rows and versions."""
    values = {k: v for k, v in entry.recipe.values.items() if k not in ("output_dir", "overwrite_output_dir")}
    files = [file for source in setup.sources or () if source is not None for file in source.files]
    place = Path(model_path(entry.recipe))
    if place.is_dir():  # the same weights elsewhere are the same model, and others in their place are not
        found = [f for f in sorted(place.iterdir()) if f.suffix in (".safetensors", ".bin", ".json", ".jinja")]
        values["model_name_or_path"] = _content(tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in found))
    recipe = to_yaml(replace(entry.recipe, values=values))
    made = {"recipe": recipe, "select": entry.select, "layers": list(entry.layers)}
    made |= {"rows": [fingerprint(Path(file)) for file in files], "versions": versions_of(VERSIONS)}
    return digest_of(json.loads(json.dumps(made, default=str)))
