"""The way out: what a server does not take is said before anything is written, then its files appear as a whole."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerpeft.errors import ExportError, Problems, UsageError, unknown
from layerpeft.integrations.peft import changes_weights
from layerpeft.quantization.save import is_saved, read_manifest
from layerpeft.recipe.shipped import resolve
from layerpeft.saving.whole import refusal, writing_whole
from layerpeft.text import note
from layerpeft.tuners.load import adapter_config, kind_of
from layerpeft.tuners.merge import merge_into
from layerpeft.using.export import gguf, ollama, vllm
from layerpeft.using.export.adapter import is_plain, read_adapter
from layerpeft.using.export.limits import TARGETS
from layerpeft.using.export.subject import Command, Exported, Subject
from layerpeft.using.folder import Trained, find

SERVERS: dict[str, Any] = {"vllm": vllm, "gguf": gguf, "ollama": ollama}
MERGED = "merged"
WRITTEN = ("ollama",)  # targets that have a file of their own even for a model that is whole already


def export(
    folder: str,
    to: str,
    out: str | None = None,
    *,
    base: str | None = None,
    whole: bool = False,
    start: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes what was trained as a server reads it, into a new folder (`out`: its name; FOLDER-TARGET without it).

    `to`: one of `TARGETS`. LoRA goes as an adapter, and as a whole model with `whole`; whatever else changes weights (projection,
    full weights, heads, scales) goes as a whole model. `base`: that of an adapter, where it has moved; `start`: what Ollama's FROM
    is to name; `overwrite`: an earlier merge or export gives way. Raises: ExportError naming all that the server does not take,
    before anything is written; SaveError for a damaged folder; UsageError.
    """
    if to not in TARGETS:
        raise UsageError(f"--to: {unknown('target', to, TARGETS)}")
    if start is not None and to != "ollama":
        raise UsageError("--from names what a Modelfile begins with: it goes with --to ollama alone")
    found = find(folder, base)
    more = (("--out", out) if out else ()) + ("--overwrite",) * overwrite
    subject = _subject(Subject(folder, found, None, base, start, more), whole or to == MERGED, to)
    goes = found.base is not None or to in WRITTEN  # whether anything is to be written
    target = (Path(out).expanduser() if out else _beside(found.folder, to)) if goes else found.folder
    if more and not goes:
        raise UsageError(
            f"{shlex.join(more)}: {folder} is a whole model, and nothing is written: it is served from where it lies"
        )
    _check(subject, to, target if goes else None, overwrite)
    if found.quant is not None and subject.adapter is not None:  # merging says it itself
        note(
            "it was trained over a base that was rounded to fewer bits, and goes with the unrounded one: the two differ by that"
        )
    name = name_of(found.folder)
    about = _write(subject, to, target, name) if goes else "a whole model: nothing is written"
    kind = "model" if subject.adapter is None else "adapter"
    return Exported(to, kind, target, about, tuple(_commands(subject, to, target, name)))


def _subject(alone: Subject, whole: bool, to: str) -> Subject:
    """With the adapter, where it goes as one. Raises: ExportError for weights that are not in safetensors."""
    found = alone.found
    if whole or found.base is None or not _adds(found):
        return alone
    adapter = read_adapter(found.folder, adapter_config(found.folder))
    if adapter is None:
        cure = alone.command("--to", to, "--whole")
        raise ExportError(
            f"{alone.given} holds its weights in adapter_model.bin, and servers read safetensors; `{cure}` goes"
        )
    return replace(alone, adapter=adapter)


def _adds(found: Trained) -> bool:
    """Whether it is no more than factors beside the weights."""
    works = kind_of(found.method).works_by if found.method is not None else None
    return is_plain(found.folder) and (works is None or works.mixes and not (works.whole or works.restates))


def _beside(folder: Path, to: str) -> Path:
    """FOLDER-TARGET; beside the current folder, where that is the one."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    if (home := named.resolve()).name.startswith("checkpoint-"):
        return home.parent.with_name(f"{home.parent.name}-{home.name}-{to}")
    return named.with_name(f"{named.name}-{to}")


def name_of(folder: Path) -> str:
    """What a server is to call it: a checkpoint goes by its run's name, too."""
    folder = folder.resolve()
    text = f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "trained"


# ---- before anything is written -------------------------------------------------------------------------------------


def _check(subject: Subject, to: str, target: Path | None, overwrite: bool) -> None:
    """Raises: ExportError naming every problem."""
    found = _problems(subject, to)
    reads = (subject.found.folder, subject.found.base)
    lacks = None if to == MERGED else SERVERS[to].lacks(subject)
    blocked = refusal(target, overwrite, reads, "name a new folder (--out DIR)") if target is not None else None
    problems = Problems(_title(subject, to) if found else f"{subject.given} is not exported to {to}")
    install = f"the package gguf, which writes it, is not installed: {lacks}" if lacks else None
    for text in [*found, *filter(None, (install, blocked))]:
        problems.add(text)
    problems.raise_if_any(ExportError)


def _problems(subject: Subject, to: str) -> list[str]:
    found = _base_problems(subject)
    if subject.start is not None and subject.adapter is None and subject.found.base is not None:
        found.append("--from names the base under an adapter, and this goes as a whole model: leave it out")
    if to != MERGED:
        return [*found, *SERVERS[to].problems(subject)]
    return found if subject.found.base is not None else [*found, f"{subject.given} is a whole model already"]


def _base_problems(subject: Subject) -> list[str]:
    """A base that is packed goes into no whole model; one that layerpeft alone can load is of no use to a server."""
    place = subject.found.place
    merges = subject.adapter is None and subject.found.base is not None
    if merges and not changes_weights(kind := str(adapter_config(subject.found.folder).get("peft_type"))):
        return [f"it is an adapter of the kind {kind}, which changes no weight: there is nothing to write it into"]
    cure = "name it in 16 bit: --base MODEL" if subject.found.base is not None else "export what it was packed from"
    if is_saved(place):
        if not read_manifest(place, verify=False)["plain_transformers"]:
            return [f"{place} is packed by layer, in a way that layerpeft alone loads; {cure}"]
        return [f"the base {place} is packed, and merging would round what was trained; {cure}"] if merges else []
    if merges and getattr(subject.config, "quantization_config", None):
        return [f"the base {place} is quantized, and merging would round what was trained; {cure}"]
    return []


def _title(subject: Subject, to: str) -> str:
    """Which command does something else with it that goes, and what does not."""
    plain = replace(subject, adapter=None, start=None)
    if subject.adapter is not None and not _problems(plain, to):
        cure = plain.command("--to", to, "--whole")
        return f"{subject.given} goes to {to} as a whole model (`{cure}`), and not as an adapter"
    if to != MERGED and not _problems(plain, MERGED):
        cure = plain.command("--to", MERGED)
        return f"{subject.given} goes to transformers as a whole model (`{cure}`), and not to {to}"
    return f"{subject.given} cannot go to {to}"


# ---- writing --------------------------------------------------------------------------------------------------------


def _write(subject: Subject, to: str, target: Path, name: str) -> str:
    """Writes the folder. Returns what it is, in words."""
    folder = subject.found.folder
    with writing_whole(target, "export") as partial:
        if subject.adapter is None and subject.found.base is not None:
            merge_into(folder, partial, base=resolve(subject.base) if subject.base else None)
        if to in WRITTEN:
            return ollama.write(subject, partial, name)
        if subject.adapter is None:
            return f"a whole model{'' if to == MERGED else f' for {to}'}, which transformers loads by itself"
        return vllm.write(subject, partial) if to == "vllm" else gguf.write(subject, partial, name)


def _commands(subject: Subject, to: str, target: Path, name: str) -> list[Command]:
    if to != MERGED:
        return SERVERS[to].commands(subject, target, name)
    writes = subject.found.kind.endswith(("CausalLM", "Seq2SeqLM"))
    words = ("layerpeft", "generate", str(target), "--prompt", "Hello")
    return [Command(words, "text from it")] if writes else []
