"""Shell scripts that start a training: the flags of their command as keys, its variables filled in."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from typing import Any

from layerpeft.recipe.yaml import parse

PROGRAM = "(program)"  # a key that no tool has: what the command runs, as `swift sft`
COMMANDS = {  # of a first word: the second words that train
    "swift": ("sft", "pt", "rlhf"), "llamafactory-cli": ("train",), "axolotl": ("train",), "tune": ("run",),
}  # fmt: skip
SCRIPTS = ("finetune", "sft", "rlhf", "dpo", "train", "reward", "raft", "ppo", "run_")
_SET = re.compile(r"^\s*(?:export\s+|local\s+)?([A-Za-z_]\w*)=(.*)$")
_USED = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
_ASKED = re.compile(r"\$[(\d@#*]|`")  # what only running it would tell: a command's output, words of the command line
_ENDS = ("|", ">", ">>", "2>", "&", "&&", ";", "<", "2>&1", "||")


def flags(text: str) -> dict[str, Any]:
    """The flags of the script's command that trains, as any YAML would have them, and what it runs under `PROGRAM`.

    Raises: ValueError where there is none, or a flag holds a variable that the script does not set.
    """
    found = _command(text)
    if found is None:
        raise ValueError("no command in it trains (swift sft --…, python examples/finetune.py --…)")
    program, words, variables = found
    filled = [_filled(word, variables) for word in words]
    lost = sorted({name for word in filled for name in _unset(word)})
    if lost:
        raise ValueError(f"the script does not set {', '.join(lost)}, which its command uses")
    return {PROGRAM: program} | _pairs(filled)


def _command(text: str) -> tuple[str, list[str], dict[str, str]] | None:
    """What runs, the words behind it, and the variables that were set before."""
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        if (found := _SET.match(line)) and not _ASKED.search(found[2]):
            try:
                value = shlex.split(found[2], comments=True)
            except ValueError:
                continue
            if len(value) <= 1:
                variables[found[1]] = _filled(value[0], variables) if value else ""
                continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        for at, word in enumerate(words):
            if (length := _program(words, at)) is not None:
                rest = words[at + length :]
                end = next((i for i, w in enumerate(rest) if w in _ENDS), len(rest))
                name = PurePosixPath(word).name
                return " ".join([name, *words[at + 1 : at + length]]), rest[:end], variables
    return None


def _program(words: list[str], at: int) -> int | None:
    """How many words name what trains, from this one on; None where it is something else."""
    name = PurePosixPath(words[at]).name
    if name in COMMANDS and words[at + 1 : at + 2] and words[at + 1] in COMMANDS[name]:
        return 2
    script = name.endswith(".py") and any(part in name for part in SCRIPTS)
    return 1 if script and any(word.startswith("--") for word in words[at + 1 :]) else None


def _filled(text: str, variables: dict[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[3]
        return variables.get(name, found[2] if found[2] is not None else found[0])

    return _USED.sub(value, text)


def _unset(text: str) -> list[str]:
    return [found[1] or found[3] for found in _USED.finditer(text)]


def _pairs(words: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--switch`, `--key several values`."""
    given: dict[str, list[str]] = {}
    last = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            last = name.replace("-", "_")
            given[last] = [value] if equals else []
        elif last is not None:
            given[last].append(word)
    return {key: _value(values) for key, values in given.items()}


def _value(values: list[str]) -> Any:
    if not values:
        return True
    found = [_scalar(value) for value in values]
    return found[0] if len(found) == 1 else found


def _scalar(text: str) -> Any:
    """As YAML reads it; JSON and text with signs of YAML's stay text."""
    document = parse(f"value: {text}", 0) if re.fullmatch(r"[\w.+\-/]+", text) else None
    if document is None or document.faults:
        return text
    value = document.data.get("value")
    return text if value is None and text.lower() not in ("null", "none", "~") else value
