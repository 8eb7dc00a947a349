"""The folder of a trained model: what it holds, what it was trained for, and its model and tokenizer, loaded as it was trained."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from layerpeft.errors import SaveError, UsageError, told
from layerpeft.integrations.files import read_text
from layerpeft.integrations.places import ADDRESS, expanded, neither
from layerpeft.integrations.sentences import modules_of
from layerpeft.model.layers import base_of
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.save import is_saved, load_saved
from layerpeft.recipe.model import auto_class, loading
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.trainers.table import ROWS
from layerpeft.recipe.yaml import parse
from layerpeft.saving.classes import class_named
from layerpeft.saving.instead import lacking
from layerpeft.saving.manifest import CONFIG, MANIFEST, check_depth, read_manifest
from layerpeft.text import note
from layerpeft.tuners.load import adapter_config, check_named, classes_of, load, load_model, load_stock

# classes of transformers for a whole model, by the table that its own class stands in; the first that holds it counts
KINDS = {
    "AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "TOKEN_CLASSIFICATION", "AutoModelForQuestionAnswering": "QUESTION_ANSWERING",
    "AutoModelForSpeechSeq2Seq": "SPEECH_SEQ_2_SEQ", "AutoModelForSeq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
    "AutoModelForMaskedLM": "MASKED_LM", "AutoModelForImageClassification": "IMAGE_CLASSIFICATION", "AutoModelForCTC": "CTC",
}  # fmt: skip
VECTORS = "AutoModel"  # of whole models of sentence-transformers, by what lies beside them
TRAINERS = {  # of folders that do not say theirs: whose rows their models are for
    "AutoModelForCausalLM": "sft", "AutoModelForSequenceClassification": "classification",
    "AutoModelForTokenClassification": "token_classification", "AutoModelForQuestionAnswering": "question_answering",
    "AutoModelForSeq2SeqLM": "seq2seq", "AutoModelForMaskedLM": "masked_lm",
    "AutoModelForImageClassification": "image_classification", "AutoModelForCTC": "speech", "AutoModelForSpeechSeq2Seq": "speech",
    VECTORS: "embeddings",
}  # fmt: skip
CLASSIFIES = ("SequenceClassification", "TokenClassification", "ImageClassification")


@dataclass(frozen=True)
class Trained:
    """A folder as it was read; no weight is loaded. `base`: folder or name of the model under an adapter, None of a whole model;
    `kind`: transformers' class; `recipe`: what training was told, as far as it lies there; `task`: what training rows said;
    `method`: of a recorded adapter."""

    folder: Path
    base: str | None
    kind: str
    recipe: Recipe
    config: Any
    task: Mapping[str, Any] = field(default_factory=dict)
    quant: Mapping[str, Any] | None = None
    verified: bool = False
    method: str | None = None

    @property
    def trainer(self) -> str:
        return self.recipe.trainer

    @property
    def place(self) -> str:
        """Where the weights of the whole model lie."""
        return self.base or str(self.folder)


def find(folder: str, model: str | None = None) -> Trained:
    """What lies in a folder: an adapter, whose base `model` may replace, a checkpoint, or a whole model (or a name on the hub).

    Raises: SaveError for what is neither, is damaged, or whose base is not to be had.
    """
    folder, model = resolve(folder), model and resolve(model)
    path = expanded(folder)
    if (path / CONFIG).is_file() or (path / MANIFEST).is_file():
        return _adapter(path, model)
    if not path.is_dir() and (path.exists() or not ADDRESS.fullmatch(folder)):
        raise SaveError(lacking(path, CONFIG, "config.json"))
    if model is not None:
        raise UsageError(f"--base names the base of an adapter, and {folder} is none (it has no {CONFIG})")
    if path.is_dir() and not (path / "config.json").is_file():
        raise SaveError(lacking(path, CONFIG, "config.json"))
    place = str(path) if path.is_dir() else folder
    config = _config(place, f"{folder} is no model that transformers can load" if path.is_dir() else None)
    kind = (VECTORS if modules_of(place) else _kind_of(config)) or _unknown(folder)
    recipe, said = _recipe(path, kind, place, {})
    return Trained(path if path.is_dir() else Path(folder), None, kind, recipe, config, said)


def _adapter(path: Path, model: str | None) -> Trained:
    said = adapter_config(path)
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
    base = model or said.get("base_model_name_or_path")
    cure = f"name it: --base MODEL (was {base!r})" if model is None else "name another one"
    if not base:
        raise SaveError(f"{path / CONFIG} does not say which model it was trained on; name it: --base MODEL")
    check_named(path, base, cure)
    config = _config(base, f"the base model {base!r} of {path} is not there; {cure}", said.get("revision"))
    check_depth(manifest, config, f"{base!r}")
    task = dict(manifest.get("task") or {})
    trainer = task.get("trainer") or _values(path).get("trainer")
    kind = class_named(said)
    kind = kind and (_kind_of(config, kind) or kind)
    recipe, _ = _recipe(path, kind, base, task)
    if trainer in ROWS and (kind is None or ROWS[str(trainer)].vectors):
        kind = auto_class(recipe).__name__
    kind = kind or _kind_of(config) or _unknown(str(path))
    recipe, task = _recipe(path, kind, base, task)
    method = manifest.get("method")
    return Trained(path, base, kind, recipe, config, task, manifest.get("quant"), bool(manifest), method)


def _config(place: str, wrong: str | None, revision: str | None = None) -> Any:
    """Raises: SaveError, which says what is `wrong` and why; None of what is no folder here, and may be a name on the hub."""
    try:
        return transformers.AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    except Exception as error:  # what lies there, and the hub, fail in many ways
        why = told(error, 300)
        raise SaveError(f"{wrong} ({why})" if wrong is not None else f"{neither('folder', place)}: {why}") from error


def _kind_of(config: Any, named: str | None = None) -> str | None:
    """The auto class of a class (the first that the config names), where there is one."""
    named = named or next(iter(getattr(config, "architectures", None) or ()), None)
    for kind, table in KINDS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").get(config.model_type, ())
        if named in ([names] if isinstance(names, str) else names):
            return kind
    return None


def _unknown(folder: str) -> str:
    raise SaveError(f"{folder} does not say what its model is for; there are {', '.join(KINDS)}")


def _values(path: Path) -> dict[str, Any]:
    """The top level of the recipe that lies beside, or above a checkpoint."""
    for home in (path, path.parent) if path.name.startswith("checkpoint-") else (path,):
        if (home / "recipe.yaml").is_file():
            try:
                return {k: v for k, v in parse(read_text(home / "recipe.yaml")).data.items() if k != "layerpeft"}
            except (OSError, ValueError):
                return {}
    return {}


def _recipe(path: Path, kind: str | None, place: str, task: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """What training was told, with the model that there is now; code that comes with a model is not run."""
    values = _values(path)
    trainer = str(task.get("trainer") or values.get("trainer") or TRAINERS.get(str(kind), "sft"))
    trainer = trainer if trainer in ROWS else TRAINERS.get(str(kind), "sft")
    base = {"trainer": trainer, "model_name_or_path": place, "output_dir": str(path), "trust_remote_code": False}
    return Recipe(str(path), path / "recipe.yaml", trainer, values | base, "", None, {}), {**task, "trainer": trainer}


# ---- loading --------------------------------------------------------------------------------------------------------


def tokenizer_of(found: Trained, kind: str = "AutoTokenizer") -> Any:
    """The tokenizer (or processor) that was saved beside the weights, else that of the base."""
    homes = [found.folder, *([found.folder.parent] if found.folder.name.startswith("checkpoint-") else []), found.place]
    names = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    here = [str(h) for h in homes if any((Path(h) / name).is_file() for name in names)]
    place = here[0] if here else found.place
    try:
        made = getattr(transformers, kind).from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # libraries raise what they like
        raise SaveError(f"{place} holds no tokenizer that can be read ({told(error, 300)})") from error
    if getattr(made, "pad_token", "") is None:
        made.pad_token = made.eos_token
    return made


def load_found(found: Trained) -> Any:
    """Its model on the device that there is, for use: nothing trains, dropout is off. Raises: SaveError."""
    note(f"loading {found.folder}" + (f" on {found.base}" if found.base else ""))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    options: dict[str, Any] = {"dtype": "auto", **_asked(found), "trust_remote_code": False}
    if found.base is None:
        folder = found.folder
        model = load_saved(folder) if is_saved(folder) else _from(found.kind, str(folder), options)
    else:
        base = _base(found, options | _head(found))
        model = load(found.folder, base) if found.verified else load_stock(found.folder, base)
    own = base_of(model)
    packed = found.quant is not None or getattr(own, "is_quantized", False)
    if getattr(own, "hf_device_map", None) is None and (device.type != "cpu" or not packed):
        model.to(device)
    return model.eval()


def _asked(found: Trained) -> dict[str, Any]:
    """How the weights were read when they were trained."""
    told_of = {k: v for k, v in loading(found.recipe).items() if v is not None}
    own = {"dtype", "attn_implementation", "quantization_config", "device_map", "revision", "subfolder", "key_mapping"}
    drop = {"quantization_config", "revision", "subfolder"} if found.base is None else set()
    return {k: v for k, v in told_of.items() if k in own - drop}


def _base(found: Trained, options: dict[str, Any]) -> nn.Module:
    base = str(found.base)
    if is_saved(base):
        return load_saved(base)
    if found.quant is not None:
        wanted = Quantized.from_dict(found.quant)
        more: dict[str, Any] = options | {"dtype": wanted.dtype or None}
        return load_model(base, wanted, kind=found.kind, **more)
    return _from(found.kind, base, options)


def _from(kind: str, place: str, options: Mapping[str, Any]) -> Any:
    try:
        return getattr(transformers, kind).from_pretrained(place, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries raise what they like
        raise SaveError(f"the model {place!r} cannot be loaded ({told(error, 400)})") from error


def _head(found: Trained) -> dict[str, Any]:
    """What the base's config has to say, so that it has the head that the adapter was saved with."""
    spells = found.kind.endswith("CTC")
    if not (spells or any(name in found.kind for name in CLASSIFIES)):
        return {}
    said = classes_of(found.folder, {})
    pads = spells or ("Seq" in found.kind and getattr(found.config, "pad_token_id", None) is None)
    if pads and "pad_token_id" not in said:
        said |= {"pad_token_id": getattr(tokenizer_of(found), "pad_token_id", None)}
    return said | ({"ignore_mismatched_sizes": True} if said.keys() & {"num_labels", "id2label"} else {})


def command(verb: str, found: Trained, *words: str) -> str:
    """A command on the same folder, to paste into a shell."""
    return shlex.join(["layerpeft", verb, os.fspath(found.folder), *words])
