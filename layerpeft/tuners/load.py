"""Loading a base model in the precisions it will be used in, where these can be known before a weight is read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from layerpeft.errors import ConfigError, SaveError, SelectionError, told, unknown
from layerpeft.integrations.empty import empty_model
from layerpeft.integrations.files import as_written, header_of, read_json, tensors_trouble
from layerpeft.integrations.peft import BASE_BIAS, leaving, watch_keys
from layerpeft.integrations.places import ADDRESS, expanded, looked_for, meant
from layerpeft.model import precisions, stacked
from layerpeft.model.heads import holder
from layerpeft.model.layers import base_of, stacks_of
from layerpeft.model.names import adapted, clean, upwards
from layerpeft.model.patterns import check_patterns
from layerpeft.model.precisions import KEPT, precision_of
from layerpeft.quantization import apply
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.assign import allot, decided_early
from layerpeft.quantization.config import LayerQuantConfig
from layerpeft.quantization.load import load_quantized
from layerpeft.quantization.quantize import applied
from layerpeft.quantization.save import is_saved, load_saved
from layerpeft.saving.classes import MODELS, class_named
from layerpeft.saving.instead import lacking
from layerpeft.saving.manifest import (
    CONFIG,
    MANIFEST,
    STATES,
    WEIGHTS,
    check_depth,
    has_weights,
    keys_in,
    read_manifest,
)
from layerpeft.selection.scoring import needs
from layerpeft.selection.typecheck import read_fields
from layerpeft.text import note, some
from layerpeft.training import backward, steps
from layerpeft.training.record import HEAD, LETTERS, Record, read_record, record_of, write_record
from layerpeft.tuners.assume import fixed
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.methods import METHODS
from layerpeft.tuners.precision import asked, decides_early

Wish = LayerLoraConfig | LayerQuantConfig | Quantized | Mapping[str, Any]
PREFIX = "base_model.model."  # of PEFT's names
PEFT_OPTIONS = (
    "adapter_name", "config", "autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "key_mapping",
)  # fmt: skip
ARCHITECTURE = ("num_labels", "id2label", "label2id", *HEAD, "trust_remote_code", "code_revision", "cache_dir", "token")


def load_model(
    name: str | os.PathLike[str],
    config: Wish | None = None,
    *,
    kind: str = "AutoModelForCausalLM",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    revision: str | None = None,
    batches: Iterable[Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """The model of a folder or of the hub, stored as `config` says: each linear is quantized before the next one is read.

    `config`: a `LayerQuantConfig` or a dict; a training config (`get_peft_model` then finds its base as it wants it); what was
    done before; or None for a folder of `save_model`, in the precisions it was saved in. The peak is the result and one linear.
    Where a choice needs the weights first (scores by weights or data), the model is loaded in 16 bit and quantized in place: at
    once for a `LayerQuantConfig`, on `batches` if need be, and by `get_peft_model` for a training config. `kind`: class of
    transformers; `kwargs` go to its `from_pretrained`.
    Raises: ConfigError, SelectionError, ScoreError, QuantizationError.
    """
    if config is not None and not isinstance(config, LayerLoraConfig | Quantized):
        config = LayerQuantConfig.parse(config)
    if is_saved(name):
        return _saved(name, config, dtype, device, progress, kwargs)
    if config is None:
        raise ConfigError(
            f"{os.fspath(name)} was not written by save_model: say how it is to be stored, as in {{'bits': 4}}"
        )
    options: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision, **kwargs}
    wanted = early(config, lambda: _empty(name, kind, dtype, revision, kwargs))
    if wanted is not None:
        model = load_quantized(name, wanted.assignment, wanted.storage, kind=kind, progress=progress, **options)
        applied(model, wanted)  # all is stored so by now: it is compared, kept and told
        return model
    model = load_quantized(name, {}, precisions.PLAIN, kind=kind, progress=progress, **options)
    if isinstance(config, LayerQuantConfig):
        from_data = batches if batches is not None else config._batches
        applied(model, allot(config, model, from_data, progress=progress))
    elif isinstance(config, LayerLoraConfig) and config.quantizes:
        note(
            "which layers are quantized hangs on the weights or on data: loaded in 16 bit, to be quantized when it is wrapped"
        )
    return model


def _saved(
    name: str | os.PathLike[str],
    config: Wish | None,
    dtype: Any,
    device: Any,
    progress: bool,
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """A folder of `save_model`. Raises: SaveError; QuantizationError where `config` asks for other precisions."""
    options = dict(kwargs) | ({"dtype": dtype} if dtype is not None else {})
    model = load_saved(name, device=device, progress=progress, **options)
    wanted = early(config, lambda: model) if config is not None else None
    if wanted is not None:
        apply.apply(model, wanted.modules, wanted.storage)
    return model


def early(config: Wish | Any, empty: Any) -> Quantized | None:
    """The precisions that a config means, known from the architecture alone; None where weights or data decide.

    `empty`: makes the model without weights. Raises: ConfigError, SelectionError.
    """
    if isinstance(config, Quantized):
        return config
    if isinstance(config, LayerQuantConfig):
        return allot(config, empty()) if decided_early(config) else None
    if not isinstance(config, LayerLoraConfig) or not config.quantizes or config.stored is not None:
        return config.stored if isinstance(config, LayerLoraConfig) else None
    if not decides_early(config):
        return None
    if config.is_scheduled or needs(config.choosing) == "nothing":
        model = empty()
        stacks = stacks_of(model)
        return asked(config, model, fixed(config, model, stacks).layers, stacks=stacks)
    # layers are chosen by the weights or by data, of which precisions are independent
    return asked(config, empty(), ())


def _empty(
    name: str | os.PathLike[str], kind: str, dtype: Any, revision: str | None, kwargs: Mapping[str, Any]
) -> nn.Module:
    """The model without weights. Raises: ConfigError where there is no such model or class."""
    if not hasattr(transformers, kind):
        close = [n for n in dir(transformers) if n.startswith("AutoModelFor")]
        raise ConfigError(unknown("class of transformers", kind, close))
    options = {k: v for k, v in kwargs.items() if k in ARCHITECTURE}
    config = kwargs.get("config")
    try:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(os.fspath(name), revision=revision, **options)
        trusted = {k: v for k, v in options.items() if k == "trust_remote_code"}
        return base_of(empty_model(getattr(transformers, kind), config, dtype, **trusted))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"no model can be built from {os.fspath(name)!r}: {told(error, 300)}") from error


# ---- under a saved adapter ------------------------------------------------------------------------------------------


def stored_base(folder: str | os.PathLike[str], given: Mapping[str, Any]) -> tuple[nn.Module | None, dict[str, Any]]:
    """The base of a saved adapter, quantized as it was when that trained, and what of `given` is left for PEFT.

    None where the base was not quantized by layer. Raises: SaveError where it does not say which base, or that cannot be had.
    """
    stored = read_manifest(folder).get("quant")
    config = adapter_config(Path(folder))
    base = config.get("base_model_name_or_path")
    for_peft = {k: v for k, v in given.items() if k in PEFT_OPTIONS}
    for_base = {k: v for k, v in given.items() if k not in PEFT_OPTIONS}
    if base and is_saved(base):
        return load_saved(base, **for_base), for_peft
    if stored is None:
        return None, dict(given)
    wanted = Quantized.from_dict(stored)
    kind = class_named(config)
    if not base or not hasattr(transformers, str(kind)):
        raise SaveError(
            f"{folder} does not say which base it was trained on, or of which class; give it: load({os.fspath(folder)!r}, model)"
        )
    options: dict[str, Any] = {"dtype": wanted.dtype or None} | classes_of(folder, for_base)
    with as_written(f"the base model {base!r} of {folder} cannot be loaded"):
        return load_model(base, wanted, kind=str(kind), **options), for_peft


def classes_of(folder: str | os.PathLike[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and what a config must say besides to have the head that was saved: its classes by name. What was given counts."""
    folder = Path(folder)
    recorded = (folder / MANIFEST).is_file()
    head = dict(read_manifest(folder).get("head") or {}) if recorded else _counted_head(folder)
    homes = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    labels = next(
        (home / "labels.json" for home in homes if (home / "labels.json").is_file()), None
    )  # a recipe's classes
    if (not head or not recorded) and labels is not None:
        found = read_json(labels, kind=(dict, list))
        head = {"id2label": found if isinstance(found, dict) else dict(enumerate(found))}
    with as_written(f"{folder} does not name its classes"):
        names = {int(i): name for i, name in (head.pop("id2label", None) or {}).items()}
        by_name = {name: i for i, name in names.items()}
    if LETTERS[0] in head:
        return head | {"ignore_mismatched_sizes": True} | dict(given)
    if "num_labels" in head:
        return head | dict(given)
    if not names or given.get("num_labels", len(names)) != len(names) or {"id2label", "config"} & set(given):
        return dict(given)
    rest = {k: v for k, v in given.items() if k != "num_labels"}
    known = {k: v for k, v in head.items() if v is not None} | _other_head(folder, len(names))
    return known | {"id2label": names, "label2id": by_name} | rest


def _counted_head(folder: Path) -> dict[str, Any]:
    """What the weights of an adapter without a record say of a head that was saved whole: its last matrix is the lowest of them."""
    kind, path = str(class_named(adapter_config(folder))), folder / WEIGHTS[0]
    spells = kind.endswith("CTC")
    if not (spells or "Classification" in kind) or not path.is_file():
        return {}
    rows = [shape[0] for name, (shape, _) in header_of(path).items() if "lora_" not in name and len(shape) == 2]
    return {LETTERS[0] if spells else "num_labels": min(rows), "ignore_mismatched_sizes": True} if rows else {}


def _other_head(folder: str | os.PathLike[str], classes: int) -> dict[str, Any]:
    """What lets a base load that has a head for another number of classes, in the place of which the adapter brings its own."""
    config = adapter_config(Path(folder))
    base = config.get("base_model_name_or_path")
    if config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS") or not base or is_saved(base):
        return {}
    try:
        there: Any = transformers.AutoConfig.from_pretrained(
            base, revision=config.get("revision"), trust_remote_code=False
        )
    except (OSError, ValueError):  # whatever it is, loading the base says it
        return {}
    heads = any("Classification" in name for name in there.architectures or ())
    return {"ignore_mismatched_sizes": True} if heads and there.num_labels != classes else {}


def _name_classes(model: nn.Module, said: Mapping[str, Any]) -> None:
    """Gives a base that came from elsewhere what it lacks of these."""
    config: Any = getattr(model, "config", None)
    if "id2label" not in said or len(getattr(config, "id2label", None) or ()) != len(said["id2label"]):
        return
    if set(config.id2label.values()) == {f"LABEL_{i}" for i in config.id2label}:
        config.id2label, config.label2id = dict(said["id2label"]), dict(said["label2id"])
    if getattr(config, "pad_token_id", None) is None and "pad_token_id" in said:
        config.pad_token_id = said["pad_token_id"]


def quantized_linears(model: nn.Module) -> bool:
    """Whether any linear of the model is stored in fewer bits."""
    return any(hasattr(m, "in_features") and precision_of(m) != KEPT for m in model.modules())


def load_verified(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, is_trainable: bool = False, **kwargs: Any
) -> peft.PeftModel:
    """A saved adapter on its base model, verified before any weight is read, with the record for `layer_report`.

    Without `model` the base is built from what adapter_config.json names; `kwargs` go to PEFT's (and, then,
    transformers') `from_pretrained`. Raises: SaveError for a damaged folder, or a base that is not to be had or does
    not fit.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    record = read_record(manifest)
    check_chosen(folder, record)
    left = BASE_BIAS if kind_of(record.method).works_by.restates else None
    loaded = _placed(folder, model, manifest, left, {**kwargs, "is_trainable": is_trainable})
    loaded.peft_config[kwargs.get("adapter_name", "default")]._layerpeft = record  # type: ignore[attr-defined]
    return loaded


def load_stock(folder: str | os.PathLike[str], model: nn.Module | None = None, **kwargs: Any) -> peft.PeftModel:
    """An adapter that keeps no record on its base model: LoRA on every layer, or one of plain PEFT's. Each of its tensors has its
    place in the model. Raises: SaveError."""
    check_stock(Path(folder))
    return _placed(Path(folder), model, {}, None, kwargs)


def check_stock(folder: Path) -> None:
    """Raises: SaveError where a folder without a record holds no whole adapter that PEFT can read by itself."""
    there = [name for name in WEIGHTS if (folder / name).is_file()]
    if any((folder / name).exists() for name in STATES) or not (folder / CONFIG).is_file():
        read_manifest(folder)  # which says what is missing
    if not there:
        raise SaveError(f"{folder} holds no weights of an adapter ({' or '.join(WEIGHTS)})")
    if trouble := tensors_trouble(folder / there[0]) if there[0] == WEIGHTS[0] else None:
        raise SaveError(f"{folder}: {trouble}")


def _placed(
    folder: Path, model: nn.Module | None, manifest: Mapping[str, Any], left: str | None, kwargs: dict[str, Any]
) -> peft.PeftModel:
    """The adapter on its base; `left`: how names end that are not loaded. Raises: SaveError where the two do not fit."""
    config = adapter_config(folder)
    watch_keys(adapted)
    with leaving(left):
        if model is None:
            loaded = _load_with_base(folder, config, classes_of(folder, kwargs))
        else:
            _check_base(folder, model, manifest)
            if hasattr(model, "config"):
                check_depth(manifest, model.config, "this one")
            with as_written(f"{folder} cannot be put on this model"):
                loaded = peft.PeftModel.from_pretrained(model, str(folder.absolute()), **kwargs)
    _check_keys(folder, loaded, kwargs.get("adapter_name", "default"), left)
    _name_classes(base_of(loaded), classes_of(folder, {}))
    return loaded


def kind_of(method: str) -> type[LayerLoraConfig]:
    """The config class of a method; of one that is not here, that of LoRA."""
    return METHODS.get(method, LayerLoraConfig)


def adapter_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, which PEFT can make a config of, and whose patterns end on the names of the adapter.

    Raises: SaveError.
    """
    path = folder / CONFIG
    said = read_json(path)
    read_fields(_Named, said, SaveError, path)
    with as_written(f"{path} is no config of an adapter"):
        config = peft.PeftConfig.from_pretrained(str(folder.absolute()))  # a relative one could pass for a hub name
    weights = folder / WEIGHTS[0]
    with as_written(f"{weights} is truncated, or holds no tensors"):
        names = header_of(weights) if weights.is_file() else ()
    try:
        check_patterns(config, [clean(n).removeprefix("base_model.model.").partition(".lora_")[0] for n in names])
    except SelectionError as error:
        raise SaveError(f"{path}: {error}") from error
    return said


@dataclass(frozen=True)
class _Named:
    """What adapter_config.json says of its base."""

    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, str | None] | None = None


def check_chosen(folder: Path, record: Record) -> None:
    """Raises: SaveError where the weights lack a target that the manifest says was chosen (of methods that save all of them)."""
    held = {clean(k.removeprefix(PREFIX)) for k in keys_in(folder)}
    inside = {n for k in held for n in upwards(k)}
    whole = not kind_of(record.method).works_by.partial
    chosen = record.selection.targets if whole and record.selection is not None else ()
    # factors of experts, whose targets are parameters, lie in the module that has these
    places = ((t, {t, *(f"{n.rpartition('.')[0]}.lora_A" for n in (t, stacked.stack_of(t)))}) for t in chosen)
    lost = [t for t, there in places if not there & inside]
    if lost:
        raise SaveError(f"{folder} lacks what {MANIFEST} says was chosen: {some(lost)}")


def _check_keys(folder: Path, loaded: peft.PeftModel, adapter: str, left: str | None) -> None:
    """Raises: SaveError where the file's tensors are not those that the model has. `left`: how names end that were not loaded."""
    there = {adapted(k) for k in keys_in(folder) if left is None or not k.endswith(left)}
    kept = peft.get_peft_model_state_dict(loaded, adapter_name=adapter, save_embedding_layers=False)
    kept = {k: t for k, t in kept.items() if left is None or not k.endswith(left)}
    missing = [k for k in kept if k not in there]
    strange = sorted(there - kept.keys() - set(map(adapted, loaded.state_dict())))
    if missing or strange:
        raise SaveError(
            f"the adapter in {folder} does not fit, so part of it would load as nothing. Missing: {some(missing) or 'none'}; "
            f"without a place in the model: {some(strange) or 'none'}"
        )


def check_named(folder: Path, base: str | os.PathLike[str] | None, cure: str) -> None:
    """Raises: SaveError where the base that an adapter names, or that is given for it, is a path at which nothing lies, or a folder
    that holds no model, as an adapter, which transformers would load with the model below it. `cure`: what to do about it."""
    if not base:
        return
    base = os.fspath(base)
    place = expanded(base)
    if not ADDRESS.fullmatch(base) and not place.exists():
        raise SaveError(f"the base model {base!r} of {folder} is not there ({looked_for(base)}); {cure}{meant(base)}")
    if place.exists() and not (place / "config.json").is_file():
        raise SaveError(f"the base model {base!r} of {folder}: {lacking(place, 'config.json')}; {cure}")


def _load_with_base(folder: Path, config: Mapping[str, Any], kwargs: dict[str, Any]) -> peft.PeftModel:
    """Build the base model by the task type or class that adapter_config.json names, and put the adapter on it."""
    task, base = config.get("task_type"), config.get("base_model_name_or_path")
    cure = f"pass the base model: load({str(folder)!r}, model)"
    if not base:
        raise SaveError(f"{folder / CONFIG} does not name a base model (base_model_name_or_path is empty); {cure}")
    if not task and not config.get("auto_mapping"):
        raise SaveError(f"{folder / CONFIG} says neither task_type nor the class of the base model {base!r}; {cure}")
    if task and task not in MODELS:
        raise SaveError(f"{folder / CONFIG} has a task_type, {task!r}, without a model class; {cure}")
    check_named(folder, base, cure)
    use = (MODELS[task].removeprefix("AutoModel") or "ForFeatureExtraction") if task else ""
    auto = getattr(peft, f"AutoPeftModel{use}")
    # not found, no such class, a class from a package that peft will not import, code that nobody has allowed
    options = kwargs if config.get("auto_mapping") and not task else {"trust_remote_code": False} | kwargs
    try:
        with as_written(f"the base model {base!r} of {folder} cannot be loaded"):
            if LETTERS[0] in kwargs:  # letters are no words: PEFT would look for their embeddings
                kind, own = (
                    getattr(transformers, config["auto_mapping"]["base_model_class"]),
                    (*PEFT_OPTIONS, "is_trainable"),
                )
                model = kind.from_pretrained(base, **{k: v for k, v in options.items() if k not in own})
                return peft.PeftModel.from_pretrained(
                    model, str(folder), **{k: v for k, v in kwargs.items() if k in own}
                )
            return auto.from_pretrained(str(folder.absolute()), **options)
    except SaveError as error:
        raise SaveError(f"{error}\nThen {cure}") from error


def _check_base(folder: Path, model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Raises: SaveError when `model` is wrapped already, or lacks chosen targets: PEFT would say nothing."""
    if isinstance(model, peft.PeftModel):
        raise SaveError("load() takes the base model, not a PeftModel; model.load_adapter(folder, name) adds to that")
    selection = manifest.get("selection") or {}
    names = {adapted(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    places = ((name, {name, holder(name), stacked.holder(name)}) for name in selection.get("targets", ()))
    lost = [name for name, held in places if not held & names]
    if lost:
        raise SaveError(
            f"{folder} was trained on another model: {type(model).__name__} lacks {len(lost)} of its "
            f"{len(selection['targets'])} targets, such as {lost[0]!r}"
        )


def load(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, is_trainable: bool = False, **kwargs: Any
) -> Any:
    """A saved adapter on its base model, verified before any weight is read, with the record of what was chosen and why.

    Of a folder that `save_model` wrote: that model, in the precisions it was saved in.

    Without `model` the base is built from what `adapter_config.json` names, quantized as it was when the adapter trained;
    `kwargs` go to PEFT's (and then transformers') `from_pretrained`. With `is_trainable` training is followed and checked again.
    Raises: SaveError for a damaged folder, or a base that does not fit.
    """
    folder = Path(folder)
    if model is None and is_saved(folder):
        return load_saved(folder, **kwargs)
    if model is None:
        model, kwargs = stored_base(folder, kwargs)
    elif read_manifest(folder).get("quant") is not None and not quantized_linears(model):
        note(
            f"{folder} was trained over a base that was quantized by layer, and this one is not: what it computes differs by the "
            "rounding. load(folder) without a model, or layerpeft.quantize(model, folder) before, gives it the same base"
        )
    loaded = load_verified(folder, model, is_trainable=is_trainable, **kwargs)
    adapter = kwargs.get("adapter_name", "default")
    live: Any = loaded.peft_config[adapter]
    tuner: Any = loaded.base_model
    record: Record = live._layerpeft
    kind = kind_of(record.method)
    live.__class__ = kind.seen_as
    method = record.bound = kind.loaded(tuner.model, adapter, live, is_trainable, folder)
    method.adopt(is_trainable)
    if is_trainable:
        steps.follow(method, tuner)
        chosen = record.selection
        within = chosen is not None and chosen.in_parts
        backward.install(tuner.model, chosen.stack if chosen is not None else None, within=within)
    else:
        steps.watch(tuner.model)
    return loaded


def save_record(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes the record beside an adapter that transformers' own `model.save_pretrained` has saved.

    (`PeftModel.save_pretrained` does it by itself.) Raises: ConfigError where nothing was chosen, or no weights are there.
    """
    live = getattr(model, "peft_config", {}).get(adapter_name)
    record = record_of(live)
    if record is None or record.selection is None:
        raise ConfigError(
            f"the adapter {adapter_name!r} has no choice of layers to record (select='all', or still pending)"
        )
    if not has_weights(folder):
        raise ConfigError(f"{folder} holds no weights of an adapter; call model.save_pretrained({str(folder)!r}) first")
    write_record(folder, base_of(model), record, adapter_name)
