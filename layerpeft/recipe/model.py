"""The model that a recipe names: its class, its config, and its architecture without weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.quantizers.auto import AutoQuantizationConfig

from layerpeft.errors import ConfigError, Problem, RecipeError, hint, told, unknown
from layerpeft.integrations import empty
from layerpeft.integrations.code import admit
from layerpeft.integrations.code import named as file_named
from layerpeft.integrations.files import as_written
from layerpeft.integrations.places import expanded, neither
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.trainers.row import named

# what from_pretrained is told about reading weights; every other key of model_init_kwargs is one of the model's config
LOADING = (
    "dtype", "torch_dtype", "attn_implementation", "experts_implementation", "revision", "device_map", "max_memory",
    "offload_folder", "offload_buffers", "quantization_config", "subfolder", "variant", "cache_dir", "force_download",
    "local_files_only", "token", "use_safetensors", "ignore_mismatched_sizes", "key_mapping", "tp_plan", "tp_size", "proxies",
)  # fmt: skip
INIT = "model_init_kwargs"
OF_ROWS = ("num_labels", "id2label", "label2id")
OTHER_WAY = {"load_in_4bit", "load_in_8bit"}  # of transformers before 5


def auto_class(recipe: Recipe) -> Any:
    """The class of transformers that builds it."""
    name = recipe.row.model
    return getattr(transformers, named(name)(recipe) if "." in name else name)


def model_path(recipe: Recipe) -> str:
    """Its folder, or its name on the hub."""
    path = expanded(resolve(recipe["model_name_or_path"]))
    return str(path) if path.is_dir() else recipe["model_name_or_path"]


def code(recipe: Recipe) -> dict[str, Any]:
    """Whether code that comes with a model may run; it is named first. Raises: RecipeError where it is kept out."""
    trusted = recipe["trust_remote_code"]
    if trusted:
        allow("trust_remote_code", "trust_remote_code: true", code_of(model_path(recipe), loading(recipe)["revision"]))
    return {"trust_remote_code": trusted}


def allow(key: str, asked: str, sources: Sequence[str]) -> None:
    """Names what is about to run for a key of the recipe. Raises: RecipeError where it is kept out."""
    try:
        if sources:
            admit(asked, sources)
    except ConfigError as error:
        raise RecipeError(Problem((key,), str(error))) from error


def kernels(attention: Any) -> list[str]:
    """The repositories of the hub whose code an `attn_implementation` fetches and runs."""
    names = attention.values() if isinstance(attention, Mapping) else [attention]
    return [f"{n.rpartition('|')[2]} on the hub" for n in names if isinstance(n, str) and "/" in n]


def code_of(place: str, revision: str | None) -> list[str]:
    """The code that a model's files ask for: files of its folder, or names on the hub."""
    folder = Path(place)
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(place, revision=revision)
        parts = [config, get_tokenizer_config(place, revision=revision)]
    except Exception:  # whatever is wrong with them, loading says it better
        parts = []
    asked = [part["auto_map"] for part in _mappings(parts) if part.get("auto_map")]
    texts = [r for m in asked for r in (m.values() if isinstance(m, Mapping) else m)]
    away = [f"{r.partition('--')[0]} on the hub" for r in texts if isinstance(r, str) and "--" in r]
    if not folder.is_dir():
        return [f"{place} on the hub (revision {revision or 'main'})", *away] if asked else []
    own = folder.glob("*.py") if asked else ()
    return [file_named(p) for p in sorted([*own, *folder.glob("custom_generate/*.py")])] + away


def _mappings(parts: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """All mappings in configs, and in the configs inside them."""
    for part in parts:
        if isinstance(part, Mapping):
            yield part
            yield from _mappings(part.values())


def from_hub(recipe: Recipe, call: Any, *args: Any, **options: Any) -> Any:
    """What transformers loads. Raises: RecipeError in one sentence when it cannot."""
    return loaded("model_name_or_path", recipe["model_name_or_path"], recipe.path.parent, call, *args, **options)


def loaded(key: str, name: str, home: Path, call: Any, *args: Any, **options: Any) -> Any:
    """What transformers loads for the `key` that names a model. Raises: RecipeError, as `fetched`."""
    try:
        return fetched(name, home, call, *args, **options)
    except RecipeError as error:
        raise RecipeError(Problem((key,), f"{key}: {error}")) from error.__cause__


def fetched(name: str, home: Path, call: Any, *args: Any, **options: Any) -> Any:
    """What transformers loads of a model. Raises: RecipeError, which says of a name that is nothing here what is called much like
    it."""
    try:
        with as_written(f"cannot load {name!r}", RecipeError):
            return call(*args, **options)
    except RecipeError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not expanded(resolve(name)).exists():
            error = RecipeError(f"{neither('folder', name, home)}: {told(cause, 400)}")
        raise error from cause


def loading(recipe: Recipe) -> dict[str, Any]:
    """How its weights are read, under from_pretrained's names: the top level, and `model_init_kwargs` over it.

    Everything that loads or builds the model goes by this and by `model_config`. Raises: RecipeError.
    """
    given = dict(recipe["model_init_kwargs"] or {})
    if "torch_dtype" in given:
        given.setdefault("dtype", given.pop("torch_dtype"))
    top = {"attn_implementation": recipe["attn_implementation"], "revision": recipe["model_revision"]}
    found = {"dtype": recipe["dtype"], **top} | {k: v for k, v in given.items() if k in LOADING}
    if found.get("quantization_config") is not None:
        found["quantization_config"] = _quantization(found["quantization_config"])
    return found


def _quantization(given: Any) -> Any:
    """The config of a recipe's mapping. Raises: RecipeError."""
    wrong = ""
    if not isinstance(given, Mapping):
        return given
    kind = transformers.BitsAndBytesConfig
    if str(given.get("quant_method", "bitsandbytes")).startswith("bitsandbytes"):
        known = [n for n in inspect.signature(kind).parameters if n != "kwargs"]
        bad = [name for name in given if name not in (*known, "quant_method")]
        nothing = not given.get("load_in_4bit") and not given.get("load_in_8bit")
        wrong = "it quantizes nothing; write `load_in_4bit: true`, or take it out" if nothing else ""
        wrong = (
            "; ".join(f"unknown key {name!r}.{hint(name, known)} Allowed: {', '.join(known)}" for name in bad) or wrong
        )
    try:
        if not wrong:
            return AutoQuantizationConfig.from_dict({"quant_method": "bitsandbytes", **given})
    except Exception as error:  # constructors of other libraries raise what they like
        wrong = told(error, 300)
    raise RecipeError(Problem((INIT, "quantization_config"), f"{INIT}: quantization_config: {wrong}"))


def loading_problems(recipe: Recipe) -> list[Problem]:
    """What is wrong with the settings by which a model is loaded, as far as its config need not be read for it."""
    given = recipe["model_init_kwargs"] or {}
    found: list[Problem] = []

    def add(sentence: str, *path: str) -> None:
        found.append(Problem(path, f"{': '.join(path)}: {sentence}"))

    if not isinstance(given, Mapping):
        add(f"expected a mapping, got {given!r}; write `{INIT}: {{}}` with its settings in it, or take it out", INIT)
        return found
    for key in [k for k in given if k in OF_ROWS]:
        add("classes are those of the rows; take it out", INIT, key)
    for key in [k for k in given if k in OTHER_WAY]:
        add(f"write `{INIT}: {{quantization_config: {{{key}: {str(given[key]).lower()}}}}}`", INIT, key)
    for name, top in (("dtype", "dtype"), ("revision", "model_revision")):
        inner = given.get(name, given.get("torch_dtype") if name == "dtype" else None)
        if inner is not None and recipe.values.get(top) not in (None, inner):
            add(f"{inner!r} here and {recipe.values[top]!r} as {top} above; keep one of them", INIT, name)
    try:
        asked = loading(recipe)
    except RecipeError as error:
        return found + list(error.problems)
    dtype, attention = asked["dtype"], asked["attn_implementation"]
    if dtype not in ("auto", None) and not getattr(getattr(torch, str(dtype), None), "is_floating_point", False):
        names = ("auto", "bfloat16", "float16", "float32")
        add(f"{unknown('dtype', dtype, names)}", *((INIT, "dtype") if "dtype" in given else ("dtype",)))
    kinds = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if isinstance(attention, str) and "/" not in attention and attention not in kinds:
        add(unknown("kind of attention", attention, kinds), "attn_implementation")
    return found


def model_config(
    recipe: Recipe, labels: Sequence[str] = (), padding: int | None = None, values: Mapping[str, Any] | None = None
) -> Any:
    """Its config, with a head for `labels`; `padding`: the tokenizer's, for such a head; `values`: what rows say of it besides,
    whatever the checkpoint's own head was for. Raises: RecipeError."""
    extra: dict[str, Any] = dict(values or {})
    if labels:
        extra |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    load, given = transformers.AutoConfig.from_pretrained, recipe["model_init_kwargs"] or {}
    where = {k: v for k, v in loading(recipe).items() if k in ("revision", "subfolder")}
    described = {k: v for k, v in given.items() if k not in (*LOADING, "trust_remote_code")}
    config = from_hub(recipe, load, model_path(recipe), **where, **code(recipe), **(described | extra))
    known = [n for n in {**config.to_dict(), **dict.fromkeys(LOADING)} if not n.startswith("_")]
    if stray := [key for key in described if not hasattr(config, key)]:
        sentence = "neither the model's config nor its loading knows it; take it out."
        raise RecipeError(*(Problem((INIT, k), f"{INIT}: {k}: {sentence}{hint(k, known)}") for k in stray))
    inside = [config, *(v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig))]
    wanted = [repository for part in inside for repository in kernels(part._attn_implementation)]
    allow("model_name_or_path", f"attn_implementation in {model_path(recipe)}/config.json", wanted)
    if labels and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = padding  # the head reads the last token that is no padding
    return config


def empty_model(
    recipe: Recipe, labels: Sequence[str] = (), padding: int | None = None, values: Mapping[str, Any] | None = None
) -> nn.Module:
    """It without weights, with its kind of attention; fast ones as torch's own, which keeps as much. Raises: RecipeError."""
    config, asked = model_config(recipe, labels, padding, values), loading(recipe)
    model: Any = from_hub(recipe, empty.empty_model, auto_class(recipe), config, asked["dtype"], **code(recipe))
    with contextlib.suppress(ValueError, AttributeError):
        model.set_attn_implementation("eager" if asked["attn_implementation"] == "eager" else "sdpa")
    return model


def check_head(recipe: Recipe, classes: int) -> None:
    """Raises: RecipeError where the checkpoint has a head for another number of classes (0: of any), and says so."""
    config = model_config(recipe)
    kind = auto_class(recipe).__name__.removeprefix("AutoModel")
    heads = any(name.endswith(kind) for name in getattr(config, "architectures", None) or ())
    drawn = (recipe["model_init_kwargs"] or {}).get("ignore_mismatched_sizes")
    there = config.vocab_size if kind == "ForCTC" else config.num_labels
    if heads and classes and not drawn and there != classes:
        text = (
            f"the checkpoint has a head for {'1 class' if there == 1 else f'{there} classes'}, the rows have {classes}; "
            "model_init_kwargs: {ignore_mismatched_sizes: true} draws a new one"
        )
        raise RecipeError(Problem(("model_name_or_path",), f"model_name_or_path: {text}"))
