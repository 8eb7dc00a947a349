"""The README.md of a saved adapter: a filled model card, made of what lies beside it, which says nothing that is not known.

Whether a card may be replaced, it says itself: it holds the digest of its own text, and one that was edited since is left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from layerpeft.errors import SaveError
from layerpeft.integrations.files import read_json, replace_file, version_of
from layerpeft.integrations.places import ADDRESS
from layerpeft.saving.classes import class_named
from layerpeft.saving.manifest import CONFIG, MANIFEST
from layerpeft.saving.naming import SHIPS, Name, named
from layerpeft.saving.usage import how_to_use
from layerpeft.text import grid, measured, note, size_text, some

CARD = "README.md"
MARK = re.compile(r"<!-- written by layerpeft, ([0-9a-f]{12}): [^\n]* -->\n")
KEEP = "a text of your own in this file stays as it is"
ROWS = 64  # of the table of layers; of more than that the chosen ones alone
GAP = "[More Information Needed]"
# what TRL and transformers say of cards that they write, and write again, by themselves
AUTOMATIC = ("It has been trained using [TRL](", "generated automatically according to the information the Trainer had")
PIPELINES = {
    "ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification", "ForQuestionAnswering": "question-answering", "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification", "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition", "WhisperForConditionalGeneration": "automatic-speech-recognition",
}  # fmt: skip
PACKAGES = {
    "PEFT": "peft", "layerpeft": "layerpeft", "TRL": "trl", "Transformers": "transformers", "PyTorch": "torch",
    "Datasets": "datasets",
}  # fmt: skip
Plain = Mapping[str, Any]


def write_card(folder: Path, run: Plain | None = None) -> bool:
    """Writes the card of an adapter; `run`: what a recipe's run said of itself (`run.json`). False, with a note, where a README.md
    lies there that somebody else has written."""
    path = folder / CARD
    if path.is_symlink() or path.is_file() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        note(f"{path} was not written by layerpeft, and is left as it is")
        return False
    replace_file(path, card(_read(folder, CONFIG), _read(folder, MANIFEST), run or {}, folder).encode())
    return True


def is_ours(text: str) -> bool:
    """Whether a card may be replaced: ours as it was written, or one that a library fills in by itself, gaps included."""
    found = MARK.search(text)
    if found is not None:
        return _digest(text[found.end() :]) == found[1]
    return any(words in text for words in AUTOMATIC) or GAP in text and text.count(GAP) == _gaps()


def card(config: Plain, manifest: Plain, run: Plain, folder: Path | None = None) -> str:
    """The text of a card, of an adapter's config, its manifest and its run, each empty where there is none. `folder`: where they
    lie, near to which a base without a record may."""
    base = _base(config, manifest, run, folder)
    selection = manifest.get("selection") or {}
    parts = [
        f"# {_title(base, manifest, run)}",
        _about(base, config, manifest, run),
        *_layers(manifest, selection),
        *_reached(run),
        *_rows(manifest, run),
        *how_to_use(base, config, manifest, run),
        *_recipe(run),
        _versions(manifest),
    ]
    body = "\n\n".join(parts) + "\n"
    head = "".join(f"{line}\n" for line in _front(base, config, manifest, run))
    return f"---\n{head}---\n\n<!-- written by layerpeft, {_digest(body)}: {KEEP} -->\n{body}"


def _read(folder: Path, name: str) -> Plain:
    try:
        return read_json(folder / name)
    except SaveError:
        return {}


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip().encode()).hexdigest()[:12]


@cache
def _gaps() -> int:
    from huggingface_hub import ModelCard, ModelCardData

    return ModelCard.from_template(ModelCardData()).content.count(GAP)


# ---- front matter ---------------------------------------------------------------------------------------------------


def _front(base: Name | None, config: Plain, manifest: Plain, run: Plain) -> Iterable[str]:
    """Lines of YAML, whose texts are quoted as JSON quotes them."""
    if base is not None and ADDRESS.fullmatch(base.name):
        yield f"base_model: {json.dumps(base.name)}"
    yield "library_name: peft"
    if (licence := _said(manifest, run).get("license")) is not None:
        yield f"license: {json.dumps(licence)}"
    if (pipeline := _pipeline(config)) is not None:
        yield f"pipeline_tag: {pipeline}"
    found = [each["name"] for each in run.get("data") or () if each.get("hub")]
    if found:
        yield "datasets:"
        yield from (f"- {json.dumps(name)}" for name in dict.fromkeys(found))
    tags = ["layerpeft", str(config.get("peft_type", "")).lower(), run.get("trainer") or _trainer(manifest)]
    tags += [] if base is None or base.local else [f"base_model:adapter:{base.name}"]
    yield "tags:"
    yield from (f"- {json.dumps(tag)}" for tag in dict.fromkeys(filter(None, tags)))


def _pipeline(config: Plain) -> str | None:
    kind = class_named(config) or ""
    return next((tag for end, tag in PIPELINES.items() if kind.endswith(end)), None)


def _said(manifest: Plain, run: Plain) -> Plain:
    """What is known of the base."""
    return {k: v for of in (manifest, run) for k, v in (of.get("base") or {}).items() if v is not None}


def _base(config: Plain, manifest: Plain, run: Plain, folder: Path | None = None) -> Name | None:
    said = _said(manifest, run)
    if said.get("name"):
        return Name(str(said["name"]), bool(said.get("local")), said.get("revision"))
    place = config.get("base_model_name_or_path")
    return named(str(place), folder) if place else None


def _trainer(manifest: Plain) -> str | None:
    return (manifest.get("task") or {}).get("trainer")


# ---- what it is, and what was trained -------------------------------------------------------------------------------


def _title(base: Name | None, manifest: Plain, run: Plain) -> str:
    """Ends in what was trained of what."""
    of = base.name.rpartition("/")[2] if base is not None else "A model"
    return f"{of}: {_trained(manifest) or 'all layers'} trained{f' ({how})' if (how := _how(manifest, run)) else ''}"


def _trained(manifest: Plain) -> str | None:
    selection = manifest.get("selection") or {}
    total, unit = selection.get("num_layers"), selection.get("unit") or "layer"
    chosen = sum(bool(row.get("chosen")) for row in manifest.get("report") or ())
    return f"{chosen} of {total} {unit}s" if total else None


def _how(manifest: Plain, run: Plain) -> str:
    method, trainer = manifest.get("method") or run.get("method"), run.get("trainer") or _trainer(manifest)
    return ", ".join(filter(None, (method, trainer)))


def _about(base: Name | None, config: Plain, manifest: Plain, run: Plain) -> str:
    """The first paragraph."""
    said = _said(manifest, run)
    of = "a model whose name was not kept" if base is None else f"**{base.name}**"
    if base is not None and not base.local:
        of = f"[{base.name}](https://huggingface.co/{base.name})"
    more = [f"revision `{base.revision}`"] if base is not None and base.revision else []
    more += [f"licence {said['license']}"] if said.get("license") else []
    lines = [f"An adapter ({config.get('peft_type', 'PEFT')}) for {of}{_bracketed(more)}."]
    if said.get("ships") and base is not None:
        lines.append(f"`{base.name}` ships with `layerpeft`, whose recipes call it `{SHIPS}{base.name}`.")
    elif base is not None and base.local:
        lines.append(f"`{base.name}` was a local folder where this was trained; any copy of it will do.")
    quant = manifest.get("quant") or {}
    if quant.get("why"):
        lines.append(f"It was trained over a base in fewer bits: {quant['why']}.")
    if manifest.get("dropped"):
        lines.append("Layers were taken out of the base before: it belongs on the shorter model.")
    return "\n".join(lines)


def _bracketed(facts: Sequence[str]) -> str:
    return f" ({', '.join(facts)})" if facts else ""


def base_told(config: Plain, manifest: Plain, run: Plain) -> str:
    """What was trained of which base, in a line of plain text."""
    base = _base(config, manifest, run)
    return _title(base, manifest, run) if config else ""


def _layers(manifest: Plain, selection: Plain) -> list[str]:
    """Which were chosen and why, what moved, and by how much."""
    rows = manifest.get("report") or []
    if not rows:
        return []
    unit = selection.get("unit") or "layer"
    chosen = [row for row in rows if row.get("chosen")]
    shown = rows if len(rows) <= ROWS else chosen[:ROWS]
    lines = [f"Why these: {selection['why']}." if selection.get("why") else ""]
    lines.append(f"Chosen: {some([str(row['layer']) for row in chosen], 40)} of {len(rows)} {unit}s.")
    ends = (manifest.get("checks") or {}).get("end")
    lines += [f"Checked when training ended: {ends}."] if ends else []
    if len(shown) < len(rows):
        lines.append(f"The table shows {len(shown)} of the chosen ones; `layers.csv` has all {len(rows)}.")
    head = (unit, "name", "score", "chosen", "steps", "change of its weights")
    table = _table([head, *(_cells(row) for row in shown)], "><><>>")
    return ["## Layers", "\n".join(filter(None, lines)), table]


def _cells(row: Plain) -> tuple[str, ...]:
    score, change, steps = row.get("score"), row.get("change"), row.get("steps")
    return (
        str(row.get("layer")),
        f"`{row.get('name')}`",
        "" if score is None else f"{score:.4g}",
        "yes" if row.get("chosen") else "no",
        "" if steps is None else str(steps),
        "" if change is None else f"{100 * change:.3g}%",
    )


def _table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """A table of Markdown whose source reads as one."""
    rule = [("-" * 3 if side == "<" else "--:") for side in sides]
    lines = grid([rows[0], rule, *rows[1:]], sides, gap=" | ")
    return "\n".join(f"| {line.ljust(max(map(len, lines)))} |" for line in lines)


# ---- what a run reached, and on what --------------------------------------------------------------------------------


def _reached(run: Plain) -> list[str]:
    """Numbers before and after, time and memory, as far as they were measured."""
    before, after = run.get("before") or {}, run.get("after") or {}
    names = run.get("names") or {}
    numbers = [
        (names.get(k, k), measured(before[k]) if k in before else "", measured(after[k])) for k in names if k in after
    ]
    facts = []
    if run.get("seconds") is not None:
        steps = f"{run['steps']} optimizer steps, " if run.get("steps") else ""
        facts.append(f"Time: {steps}{run['seconds']:.0f} s of training on {run.get('device', 'cpu')}.")
    if run.get("trainable"):
        facts.append(f"Trainable: {run['trainable']:,} of {run['total']:,} parameters.")
    memory = (run.get("memory") or {}).get("measured") or {}
    if memory:
        facts.append(f"Memory: {', '.join(f'{k} {size_text(v)}' for k, v in memory.items())}.")
    if not numbers and not facts:
        return []
    table = [_table([("on held-out rows", "before", "after"), *numbers], "<>>")] if numbers else []
    return ["## What it reached", *table, *(["\n".join(facts)] if facts else [])]


def _rows(manifest: Plain, run: Plain) -> list[str]:
    """What was trained and measured on, with licences where they are known, and what became of the rows."""
    data, counts = run.get("data") or [], manifest.get("rows") or run.get("rows") or {}
    lines = []
    for each in data:
        name = f"[{each['name']}](https://huggingface.co/datasets/{each['name']})" if each.get("hub") else each["name"]
        more = [f"licence {each['license']}"] if each.get("license") else []
        more += [f"revision `{each['revision']}`"] if each.get("revision") else []
        lines.append(f"- {each['what']}: {name}{_bracketed(more)}")
    for what, found in counts.items():
        cut = f", {found['cut']} cut at {found['max_length']} tokens" if found.get("cut") else ""
        lines.append(f"- {what} rows: {found['read']} read, {found['kept']} kept{cut}")
    return ["## Rows", "\n".join(lines)] if lines else []


# ---- the end ----------------------------------------------------------------------------------------------------------


def _recipe(run: Plain) -> list[str]:
    text = str(run.get("recipe") or "").strip()
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall(r"`+", text)), 0)
    return ["## Recipe", f"{fence}yaml\n{text}\n{fence}"] if text else []


def _versions(manifest: Plain) -> str:
    """The heading is that under which PEFT looks for its own line."""
    said = manifest.get("versions") or {}
    found = {title: said.get(name) or version_of(name) for title, name in PACKAGES.items()}
    return "\n".join(["### Framework versions", "", *(f"- {title} {v}" for title, v in found.items() if v)])
