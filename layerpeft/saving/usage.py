"""How a saved adapter is loaded, used and served: code and commands that work inside of its folder as they are printed.

A base that was a local folder is somewhere else where this is read, whatever adapter_config.json says: it goes by its name, which
stands for a folder of that name in the adapter's, and is given to each call and command.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerpeft.integrations.peft import changes_weights
from layerpeft.saving.classes import class_named
from layerpeft.saving.manifest import SHORTER
from layerpeft.saving.naming import SHIPS, Name
from layerpeft.text import literal

MERGED = "merged"
Plain = Mapping[str, Any]


@dataclass(frozen=True)
class _Base:
    """Where the base is for who reads this: `code`, what Python is told of it; `word`, what commands are, None where the adapter's
    config says it; `stands`: what these names stand for, where that is not plain."""

    kind: str
    code: str
    word: str | None
    stands: str | None = None
    ships: bool = False


def how_to_use(base: Name | None, config: Plain, manifest: Plain, run: Plain) -> list[str]:
    """Parts of a card: how it loads with PEFT alone and with layerpeft (from the hub where its name there is known, else from
    inside of the folder), and the commands that use, serve and merge it."""
    there = run.get("hub")
    found = _seen(base, config, manifest, run) if base is not None else None
    parts = ["## How to load it"]
    if found is None:
        parts.append(
            'The base that it was trained on has no name here: build it, and give it on, `layerpeft.load(".", base)`.'
        )
    else:
        parts += [found.stands] if found.stands else []
        parts += _with_peft(found, manifest, there)
        parts += _with_layerpeft(found, manifest, there) if manifest else []
    return parts + _commands(found, config, run)


def _seen(base: Name, config: Plain, manifest: Plain, run: Plain) -> _Base:
    """A shortened model lies beside the adapter, since that of this name has more layers."""
    kind, there = class_named(config) or "AutoModel", run.get("hub")
    labels = (manifest.get("head") or {}).get("id2label")
    more = f", num_labels={len(labels)}" if labels else ""
    if manifest.get("dropped"):
        inside = f', subfolder="{SHORTER}"' if there else ""
        return _Base(kind, f"{literal(there or SHORTER)}{inside}{more}", SHORTER)
    if not base.local:
        revision = f", revision={literal(base.revision)}" if base.revision else ""
        told = config.get("base_model_name_or_path") == base.name  # and not a place in a cache
        return _Base(kind, f"{literal(base.name)}{revision}{more}", None if told else base.name)
    if (run.get("base") or {}).get("ships"):
        address = f"{SHIPS}{base.name}"
        return _Base(kind, f"resolve({literal(address)}){more}", address, ships=True)
    stands = (
        f"`{base.name}` stands for the folder of the base: put it, or a link to it, under that name into this folder, or write "
        "where it lies."
    )
    return _Base(kind, f"{literal(base.name)}{more}", base.name, stands)


def _with_peft(base: _Base, manifest: Plain, there: str | None) -> list[str]:
    """PEFT passes over learned biases where the base has no places for them."""
    places = "".join(f", {key}=True" for key in manifest.get("places") or ())
    why = "  # with places for the biases that were learned" if places else ""
    made = f"base = {base.kind}.from_pretrained({base.code}{places}){why}"
    lines = [made, f"model = PeftModel.from_pretrained(base, {literal(there or '.')})"]
    where = "With PEFT" if base.ships else f"Without `layerpeft`{'' if there else ', from inside of this folder'}"
    return [f"{where}:", _python(["from peft import PeftModel", *_imports(base)], lines)]


def _imports(base: _Base) -> list[str]:
    ships = ["from layerpeft.recipe.shipped import resolve  # the base comes with layerpeft"] if base.ships else []
    return [f"from transformers import {base.kind}", *ships]


def _with_layerpeft(base: _Base, manifest: Plain, there: str | None) -> list[str]:
    """The base is built by name where adapter_config.json names one that can be had anywhere."""
    imports = ["import layerpeft"] + ["from huggingface_hub import snapshot_download"] * bool(there)
    where, lines = f"snapshot_download({literal(there)})" if there else '"."', []
    if base.word is not None:
        imports += _imports(base)
        if there:
            lines, where = [f"folder = {where}"], "folder"
        lines.append(f"base = {base.kind}.from_pretrained({base.code})")
        if manifest.get("quant"):
            lines.append(f"layerpeft.quantize(base, {where})  # as it was when this was trained")
    lines.append(f"model = layerpeft.load({where}{', base' if base.word is not None else ''})")
    return [
        "With `layerpeft`, checked file by file, and with the record of what was chosen and why:",
        _python(imports, [*lines, "print(layerpeft.layer_report(model))"]),
    ]


def _python(imports: Sequence[str], lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join([*imports, "", *lines]) + "\n```"


def _commands(base: _Base | None, config: Plain, run: Plain) -> list[str]:
    """Commands, in the folder itself."""
    used, causal = run.get("used"), config.get("task_type") == "CAUSAL_LM"
    lines = []
    if "generate" in used if used is not None else causal:
        lines.append((_line(base, "generate", ".", "--prompt", "Hello"), "text from it"))
    if "predict" in (used or ()):
        about = "an answer for each row of a file of yours, which rows.jsonl stands for"
        lines.append((_line(base, "predict", ".", "rows.jsonl", "--out", "answers.csv"), about))
    if causal and (used is None or "generate" in used):
        lines.append((_line(base, "export", ".", "--to", "vllm"), "what serves it, checked, with the command"))
    if changes_weights(str(config.get("peft_type"))):
        into = MERGED if base is None or base.word != MERGED else f"{MERGED}-model"
        lines.append((_line(base, "merge", ".", into), "a full model, for where adapters cannot go"))
    return ["## How to use and serve it", "```bash\n" + "\n".join(grid_of(lines)) + "\n```"] if lines else []


def _line(base: _Base | None, *words: str) -> str:
    named = "BASE" if base is None else base.word
    return shlex.join(["layerpeft", *words, *(["--base", named] if named else [])])


def grid_of(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Commands with what they do, as comments in a column."""
    lines = list(lines)
    wide = max(len(command) for command, _ in lines)
    return [f"{command:<{wide}}  # {what}" for command, what in lines]
