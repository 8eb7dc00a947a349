"""Printed serving commands against the option names that the servers themselves have (`tests/using/serving_options.json`)."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

LISTS = json.loads((Path(__file__).parents[1] / "using" / "serving_options.json").read_text(encoding="utf-8"))
OURS = "layerpeft"


def serving(said: str) -> list[list[str]]:
    """The words of every command that stands under `next:`, each option of which its tool has."""
    lines = [line for line in said[said.index("next:") :].splitlines() if line.startswith("  ")]
    found = [shlex.split(line, comments=True) for line in lines]
    for words in found:
        check(words)
    return found


def check(words: list[str]) -> None:
    """Raises: AssertionError for a tool that is in no list, or an option that it does not have."""
    if words[0] == OURS:
        return
    tool = next((name for name in LISTS if words[: len(name.split())] == name.split()), None)
    assert tool is not None, f"no list of options for {words[:2]}"
    listed = LISTS[tool]
    assert all(source.startswith("https://") for source in listed["sources"]) and listed["version"]
    strange = [w for w in words[len(tool.split()) :] if w.startswith("-") and w not in listed["options"]]
    assert not strange, f"{tool} has no {strange}"


def check_modelfile(path: Path) -> dict[str, str]:
    """What its instructions say, all of which Ollama knows."""
    found = dict(line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    assert set(found) <= set(LISTS["Modelfile"]["options"])
    return found
