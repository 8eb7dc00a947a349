"""The tools whose files are read, by name, and whose a file is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layerpeft.errors import UsageError, unknown
from layerpeft.recipe.importing import axolotl, llamafactory, lmflow, swift, torchtune
from layerpeft.recipe.importing.draft import Draft
from layerpeft.recipe.importing.rules import COMMON, Rule
from layerpeft.recipe.importing.shell import PROGRAM


@dataclass(frozen=True)
class Tool:
    """`marks`: keys that its files are told by; `start`: reads what several keys say together; `keys`: the table of the rest;
    `defaults`: where its own are others than ours; `programs`: beginnings of commands that it is told by."""

    title: str
    marks: tuple[str, ...]
    start: Callable[[Draft], None]
    keys: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    programs: tuple[str, ...] = ()

    @property
    def table(self) -> dict[str, Rule]:
        """Its rows, and those that tools have in common."""
        return {**COMMON, **self.keys}


TOOLS: dict[str, Tool] = {
    "axolotl": Tool("axolotl", axolotl.MARKS, axolotl.start, axolotl.KEYS, axolotl.DEFAULTS, ("axolotl",)),
    "llamafactory": Tool(
        "LLaMA-Factory",
        llamafactory.MARKS,
        llamafactory.start,
        llamafactory.KEYS,
        llamafactory.DEFAULTS,
        ("llamafactory-cli",),
    ),
    "ms-swift": Tool("ms-swift", swift.MARKS, swift.start, swift.KEYS, swift.DEFAULTS, ("swift",)),
    "torchtune": Tool("torchtune", torchtune.MARKS, torchtune.start, torchtune.KEYS, torchtune.DEFAULTS, ("tune",)),
    "lmflow": Tool("LMFlow", lmflow.MARKS, lmflow.start, lmflow.KEYS, lmflow.DEFAULTS),
}


def whose(data: Mapping[str, Any], asked: str | None = None) -> Tool:
    """The tool of a file: the one that is asked for, else the one whose keys it has most of.

    Raises: UsageError where that is none, or no single one.
    """
    if asked is not None:
        if asked not in TOOLS:
            raise UsageError(f"--from: {unknown('tool', asked, TOOLS)}")
        return TOOLS[asked]
    program = str(data.get(PROGRAM, ""))
    if program and (by := next((t for t in TOOLS.values() if any(program.startswith(p) for p in t.programs)), None)):
        return by
    components = any(isinstance(v, Mapping) and torchtune.COMPONENT in v for v in data.values())
    if components:
        return TOOLS["torchtune"]
    counts = {name: sum(key in data for key in tool.marks) for name, tool in TOOLS.items()}
    best = max(counts, key=lambda name: counts[name])
    if not counts[best] or list(counts.values()).count(counts[best]) > 1:
        few = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UsageError(f"whose file this is cannot be told by its keys ({few}); say it: --from {' or '.join(TOOLS)}")
    return TOOLS[best]
