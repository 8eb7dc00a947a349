"""What is exported: a folder as it was read, and whether it goes as an adapter or as a whole model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpeft.saving.owned import RECORD
from layerpeft.using.export.adapter import Adapter
from layerpeft.using.folder import Trained

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Subject:
    """`given`: the folder's name as it was typed; `found`: what lies in it; `adapter`: as which it goes, None where as a whole
    model; `base`: another one, if it was named; `start`: what Ollama's FROM is to name; `more`: words of the command that go with
    any target."""

    given: str
    found: Trained
    adapter: Adapter | None
    base: str | None = None
    start: str | None = None
    more: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The class that the config of the base (or of the whole model) names."""
        return next(iter(getattr(self.found.config, "architectures", None) or ()), "")

    @property
    def config(self) -> Any:
        """That of the base."""
        return self.found.config

    @property
    def tied(self) -> bool:
        """Whether head and embeddings are one tensor."""
        return bool(getattr(self.found.config, "tie_word_embeddings", False))

    @property
    def template(self) -> Path | None:
        """The chat template beside an adapter, where the base has not the same: a server would go by the base's."""
        own, theirs = self.found.folder / TEMPLATE, Path(self.found.place) / TEMPLATE
        if self.adapter is None or not own.is_file():
            return None
        return None if theirs.is_file() and theirs.read_bytes() == own.read_bytes() else own

    def command(self, *words: str) -> str:
        """The same export with other words, to paste into a shell."""
        base = ["--base", self.base] if self.base else []
        return shlex.join(["layerpeft", "export", self.given, *words, *base, *self.more])


@dataclass(frozen=True)
class Command:
    """Words of a command line, and what it does."""

    words: tuple[str, ...]
    about: str

    def __str__(self) -> str:
        return f"{shlex.join(self.words)}    # {self.about}"


@dataclass(frozen=True)
class Exported:
    """What was written for a server. `folder`: None where it is the folder that was given; `kind`: "adapter" or "model"."""

    target: str
    kind: str
    folder: Path
    about: str
    commands: tuple[Command, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        files = sorted(path.name for path in there if path.name != RECORD)
        lines = [{"command": shlex.join(c.words), "about": c.about} for c in self.commands]
        return {"to": self.target, "kind": self.kind, "folder": str(self.folder), "files": files, "commands": lines}

    def __str__(self) -> str:
        lines = "\n".join(f"  {command}" for command in self.commands)
        return f"{self.folder}: {self.about}" + (f"\n\nnext:\n{lines}" if lines else "")
