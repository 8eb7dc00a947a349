"""A folder that does not hold what a command is for: what was looked for, what is there, and the nearest folder that goes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from layerpeft.integrations.places import meant
from layerpeft.text import some

ADAPTER = "adapter_config.json"
KINDS = {ADAPTER: "adapter", "config.json": "model", "compare.json": "comparison"}
RUN = (
    "log.jsonl",
    "runs",
    "trainer_state.json",
    ".layerpeft_files.json",
)  # of what trainers leave before they are done
WHOLE = "which transformers loads, and `layerpeft generate`, `predict`, `eval` and `export` take as it is"
MOST = 4  # folders that are named


def lacking(folder: Path, *wanted: str) -> str:
    """A sentence on a folder in which none of these files lies, each the mark of a kind that would do."""
    if not folder.is_dir():
        if folder.is_file() and _is_one(folder.absolute().parent, wanted):
            return f"{folder} is a file; name the folder that it lies in: {_quoted(folder.parent)}"
        return f"{folder} is not a folder{meant(folder)}"
    kinds = " and ".join(f"no {KINDS[name]}" for name in wanted)
    return (
        f"{folder} holds {kinds} (looked for {', '.join(wanted)}): {_there(folder, wanted)}{_nearest(folder, wanted)}"
    )


def _there(folder: Path, wanted: Sequence[str]) -> str:
    names = sorted(path.name for path in folder.iterdir())
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    run = [name for name in names if name in RUN or name.startswith("checkpoint-")]
    if not names:
        return "it is empty"
    if ADAPTER in names and ADAPTER not in wanted:
        return "it is an adapter, which lies on a model"
    if "config.json" in names and weights:
        return f"it is a whole model ({some(['config.json', *weights], 2)}), {WHOLE}"
    if own := [name for name in weights if name.startswith("adapter_model.")]:
        return f"{own[0]} lies there without it, so saving was cut short or the file was lost"
    if run:
        return "a run began there, and has not saved its adapter at the end"
    return f"there is {some([name for name in names if not name.startswith('.')], MOST) or some(names, MOST)}"


def _nearest(folder: Path, wanted: Sequence[str]) -> str:
    """The last checkpoint that is one of a kind that would do, or folders below or above that are."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and _is_one(path, wanted))
    if steps := {int(found[1]): p for p in below if (found := re.fullmatch(r"checkpoint-(\d+)", p.name))}:
        more = f", the last of {len(steps)} checkpoints" if len(steps) > 1 else ", its checkpoint"
        return f"; name {_quoted(steps[max(steps)])}{more}"
    if below:
        return f"; name {'one of ' * (len(below) > 1)}{some([_quoted(path) for path in below], MOST)}"
    if _is_one(above := folder.absolute().parent, wanted):
        return f"; name the folder above: {_quoted(folder.parent if folder.name else above)}"
    return ""


def _is_one(folder: Path, wanted: Sequence[str]) -> bool:
    """Whether a folder has such a file, and the weights that two of them speak of."""
    there = [name for name in wanted if (folder / name).is_file()]
    weights = {ADAPTER: "adapter_model.*", "config.json": "*.[sb]*"}
    return any(name not in weights or any(folder.glob(weights[name])) for name in there)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
