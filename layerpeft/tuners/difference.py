"""What sets two models apart, added to a third, layer by layer (a task vector, as LayRA adds instruct − base; arXiv 2509.11414).

After a base was trained further, `trained + w · (instruct − base)` gives back what it was once tuned to do. One tensor of each
model is read at a time, and no more than a piece of it is computed at once.
"""

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from layerpeft.errors import LayerMapError, Problems, SaveError
from layerpeft.integrations.empty import empty_model
from layerpeft.integrations.files import as_written, fingerprint, read_json
from layerpeft.integrations.places import meant
from layerpeft.model.layers import layer_map
from layerpeft.model.weights import PIECE
from layerpeft.saving.instead import lacking
from layerpeft.saving.manifest import CONFIG
from layerpeft.saving.shards import INDEX, Checkpoint, open_checkpoint, write_one_by_one
from layerpeft.saving.whole import refusal, writing_whole
from layerpeft.text import some
from layerpeft.tuners.layer_weights import Asked, LayerWeights, WeightOf, added
from layerpeft.tuners.merge import TOKENIZER, folder_of

RECORD = "layerpeft_merge.json"
ROLES = ("trained", "plus", "minus")


@dataclass(frozen=True)
class Side:
    """One of the three models: where it lies, and its weights."""

    folder: Path
    weights: Checkpoint


def add_difference(
    folder: str | os.PathLike[str],
    into: str | os.PathLike[str],
    plus: str | os.PathLike[str],
    minus: str | os.PathLike[str],
    weights: Asked | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `folder + w · (plus − minus)`, each the folder or name of a full model in safetensors, in the type of the first.

    `weights`: w by layer (`LayerWeights.parse`), 1 where nothing is said. The files, the config and their names are those of
    `folder`, the tokenizer and generation_config.json those of `plus`, and layerpeft_merge.json says what was merged. The target
    folder must be empty or new, or with `overwrite` an earlier merge or export, and is written last, at once. Raises, before
    anything is written: SaveError naming all that does not fit; ConfigError for weights of layers that are not there.
    """
    target = Path(into)
    if why := refusal(target, overwrite, (folder, plus, minus)):
        raise SaveError(why)
    asked = LayerWeights.parse(weights) if weights is not None else LayerWeights()
    sides = {role: _side(name, role) for role, name in zip(ROLES, (folder, plus, minus), strict=True)}
    trained = sides["trained"]
    _check(sides)
    names = _layers(trained)
    weight_of = asked.placed(names)
    said = _said(sides, names, weight_of)
    with writing_whole(target, "merge") as partial:
        for file, held in trained.weights.files.items():
            entries = {name: trained.weights.entries[name] for name in held}
            write_one_by_one(partial / file, entries, lambda name: _sum(name, sides, weight_of(name)))
        _copy(sides, partial)
        (partial / RECORD).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return target


def _sum(name: str, sides: Mapping[str, Side], weight: float) -> Any:
    """Pieces of one tensor of the result."""
    old, more, less = (sides[role].weights.read(name) for role in ROLES)
    if not weight or not old.is_floating_point():
        yield old
        return
    parts = (t.reshape(-1).split(PIECE) for t in (old, more, less))
    for mine, high, low in zip(*parts, strict=True):
        piece = added(mine, high, low, weight)
        if not torch.isfinite(piece).all():
            raise SaveError(f"{name} would hold NaN or infinity")
        yield piece


# ---- what must fit


def _side(name: str | os.PathLike[str], role: str) -> Side:
    """Raises: SaveError for what is no full model in safetensors, in numbers."""
    where = folder_of(os.fspath(name), {}, {})
    if where is None:
        raise SaveError(f"{role}: {os.fspath(name)} is no folder, nor a model that can be had{meant(name)}")
    if (where / CONFIG).is_file():
        raise SaveError(
            f"{role}: {where} holds an adapter: merge it first (layerpeft merge {shlex.quote(str(where))} NEW), and give that"
        )
    if not (where / "config.json").is_file():
        raise SaveError(f"{role}: {lacking(where, 'config.json')}")
    weights = open_checkpoint(where)
    if weights is None:
        raise SaveError(f"{role}: {where} holds no weights in safetensors")
    if read_json(where / "config.json").get("quantization_config"):
        raise SaveError(f"{role}: {where} is quantized; give it in 16 or 32 bit")
    return Side(where, weights)


def _check(sides: Mapping[str, Side]) -> None:
    """Raises: SaveError naming all that the three do not share."""
    problems, first = Problems("these models cannot be added up"), sides["trained"]
    mine, kind = first.weights.entries, read_json(first.folder / "config.json").get("model_type")
    for role in ROLES[1:]:
        side = sides[role]
        theirs, other = side.weights.entries, read_json(side.folder / "config.json").get("model_type")
        if other != kind:
            problems.add(f"{role}: {side.folder} is a {other}, and {first.folder} a {kind}")
        for held, there, says in ((mine, theirs, "lacks"), (theirs, mine, "has besides")):
            if lost := sorted(held.keys() - there.keys()):
                problems.add(f"{role}: {side.folder} {says} {len(lost)} tensors: {some(lost)}")
        shapes = [n for n in mine if n in theirs and mine[n].shape != theirs[n].shape]
        if shapes:
            told = [f"{n} {list(theirs[n].shape)}, not {list(mine[n].shape)}" for n in shapes]
            problems.add(f"{role}: {len(shapes)} shapes differ in {side.folder}: {some(told)}")
        if why := _other_words(first.folder, side.folder):
            problems.add(f"{role}: {side.folder} has another vocabulary than {first.folder}: {why}")
    problems.raise_if_any(SaveError)


def _other_words(one: Path, other: Path) -> str | None:
    """How two tokenizers differ in what their numbers stand for; None where they do not, or one of the folders has none."""
    words = [_words(folder) for folder in (one, other)]
    if not words[0] or not words[1]:
        return None
    for number in sorted(words[0].keys() | words[1].keys()):
        mine, theirs = (held.get(number) for held in words)
        if mine != theirs:
            return f"{number} is {mine!r} here and {theirs!r} there"
    return None


def _words(folder: Path) -> dict[int, str]:
    """Number -> token, special ones too; nothing where there is no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER[:2]):
        return {}
    with as_written(f"the tokenizer of {folder} cannot be read"):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return {number: token for token, number in tokenizer.get_vocab().items()}


def _layers(side: Side) -> tuple[str, ...]:
    """Names of the layers, by the model's own class. Raises: SaveError where it has none, or its tensors have other names."""
    with as_written(f"{side.folder} is no model whose layers can be found"):
        config: Any = transformers.AutoConfig.from_pretrained(side.folder, trust_remote_code=False)
        kind: Any = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
        model: nn.Module = empty_model(kind, config)
    try:
        names = layer_map(model).names
    except LayerMapError as error:
        raise SaveError(f"{side.folder}: {error}") from error
    bare = [n for n in names if not any(e.startswith(f"{n}.") for e in side.weights.entries)]
    if bare:
        raise SaveError(f"{side.folder}: no tensor lies in {some(bare)}; its tensors are called otherwise")
    return names


# ---- what is written besides


def _said(sides: Mapping[str, Side], names: tuple[str, ...], weight_of: WeightOf) -> dict[str, Any]:
    """What was merged: the formula, weights by layer, and the files of each model by size and SHA-256."""
    files = {
        role: {"folder": side.folder.name, "files": {f: fingerprint(side.folder / f) for f in side.weights.files}}
        for role, side in sides.items()
    }
    weights = {name: weight_of(name) for name in names} | {"outside": weight_of("")}
    return {"format": 1, "formula": "trained + weight * (plus - minus)", "weights": weights, **files}


def _copy(sides: Mapping[str, Side], partial: Path) -> None:
    trained, plus = (sides[role].folder for role in ROLES[:2])
    shutil.copyfile(trained / "config.json", partial / "config.json")
    if (trained / INDEX).is_file() and len(sides["trained"].weights.files) > 1:
        shutil.copyfile(trained / INDEX, partial / INDEX)
    spoken = plus if any((plus / n).is_file() for n in TOKENIZER) else trained
    settings = plus if (plus / "generation_config.json").is_file() else trained
    for folder, file in [*((spoken, n) for n in TOKENIZER), (settings, "generation_config.json")]:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, partial / file)
