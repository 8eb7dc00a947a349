"""Ollama: a Modelfile beside an adapter for llama.cpp, or beside a whole model."""

from __future__ import annotations

from pathlib import Path

from layerpeft.using.export import gguf
from layerpeft.using.export.limits import OLLAMA_FOLDERS
from layerpeft.using.export.subject import Command, Subject

FILE = "Modelfile"


def problems(subject: Subject) -> list[str]:
    """What Ollama does not take."""
    found = gguf.problems(subject)
    if subject.start is not None:
        if any(ord(c) < 32 for c in subject.start):
            found.append(f"--from {subject.start!r}: a Modelfile's FROM is one line")
        return found
    place = subject.found.place
    if subject.adapter is not None and not Path(place).is_dir():
        found.append(
            f"the base is {place!r}, a name on the hub that means nothing to Ollama; say what it is called there, or where "
            f"its GGUF file lies: {subject.command('--to', 'ollama', '--from', 'MODEL')}"
        )
    elif subject.architecture not in OLLAMA_FOLDERS:
        own = subject.adapter is not None
        cure = (
            f"python {gguf.SCRIPT} {place} --outfile base.gguf" if own else subject.command("--to", "gguf", "--whole")
        )
        then = "makes a file for --from" if own else "says how to make a GGUF file, which a Modelfile may name"
        found.append(
            f"architecture {subject.architecture!r}: Ollama imports folders of {', '.join(OLLAMA_FOLDERS)}; `{cure}` {then}"
        )
    return found


lacks = gguf.lacks


def start_of(subject: Subject) -> str:
    """What FROM names: what was said, or where the base lies."""
    named = subject.start or subject.found.place
    path = Path(named).expanduser()
    return str(path.absolute()) if path.exists() else named


def write(subject: Subject, into: Path, name: str) -> str:
    """Writes the Modelfile, with the adapter beside it. Returns what it is, in words."""
    if subject.adapter is None:
        here = subject.found.base is not None  # merged, into this very folder
        (into / FILE).write_text(f"FROM {'.' if here and not subject.start else start_of(subject)}\n", encoding="utf-8")
        return "a Modelfile and the whole model" if here else "a Modelfile"
    gguf.write(subject, into, name)
    (into / FILE).write_text(f"FROM {start_of(subject)}\nADAPTER ./{gguf.FILE}\n", encoding="utf-8")
    return f"a Modelfile and an adapter of {len(subject.adapter.factors)} linears, rank {subject.adapter.rank}"


def commands(subject: Subject, folder: Path, name: str) -> list[Command]:
    """What makes the model known to Ollama, and what talks with it."""
    return [
        Command(("ollama", "create", name, "-f", str(folder / FILE)), "makes it known to Ollama"),
        Command(("ollama", "run", name), "talk with it"),
    ]
