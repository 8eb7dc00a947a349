"""A file of another tool as plain data: YAML, JSON, or a shell script that starts a training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerpeft.errors import Problems, UsageError
from layerpeft.integrations.files import read_text
from layerpeft.integrations.places import missing
from layerpeft.recipe.importing import shell
from layerpeft.recipe.yaml import parse

MOST = 4 << 20  # bytes
_INSIDE = re.compile(r"\$\{([\w.]+)\}")


def read(path: Path) -> dict[str, Any]:
    """Its keys. Raises: UsageError with everything that keeps it from being read."""
    if not path.is_file():
        raise UsageError(missing("file", str(path)))
    try:
        text = read_text(path, MOST)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a readable text file ({error})") from error
    problems = Problems(f"import {path}")
    data: dict[str, Any] = {}
    if path.suffix in (".sh", ".bash") or text.startswith("#!"):
        try:
            data = shell.flags(text)
        except ValueError as error:
            problems.add(str(error))
    elif path.suffix == ".json":
        try:
            found = json.loads(text)
            data = found if isinstance(found, dict) else {}
        except (ValueError, RecursionError) as error:
            problems.add(f"not readable as JSON ({error})")
    else:
        document = parse(text)
        data = document.data
        for fault in document.faults:
            problems.add(str(fault).replace("the recipe", "the file"))
    if not data and not problems.items:
        problems.add("it holds no keys")
    problems.raise_if_any(UsageError)
    return {str(key): _filled(value, data) for key, value in data.items()}


def _filled(value: Any, data: Mapping[str, Any], depth: int = 0) -> Any:
    """With what `${a.b}` stands for, as OmegaConf has it; what is not there stays as it is."""
    if isinstance(value, Mapping):
        return {str(k): _filled(v, data, depth) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(item, data, depth) for item in value]
    if not isinstance(value, str) or depth > 8 or "${" not in value:
        return value

    def inside(found: re.Match[str]) -> str:
        place: Any = data
        for part in found[1].split("."):
            place = place.get(part) if isinstance(place, Mapping) else None
        return found[0] if place is None or isinstance(place, Mapping | list) else str(_filled(place, data, depth + 1))

    return _INSIDE.sub(inside, value)
