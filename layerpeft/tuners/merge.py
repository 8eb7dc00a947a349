"""An adapter and its base model as one full model on disk."""

import os
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from layerpeft.errors import SaveError
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.files import as_written, inside, read_json
from layerpeft.integrations.merging import merge_in_place, untie, weigh
from layerpeft.integrations.peft import changes_weights
from layerpeft.integrations.places import neither
from layerpeft.integrations.sentences import parts_in
from layerpeft.model.biases import give_biases
from layerpeft.model.layers import base_of, layer_map
from layerpeft.quantization.save import is_saved, load_saved, save_model
from layerpeft.saving.classes import MODELS, class_named
from layerpeft.saving.manifest import CONFIG, MANIFEST, check_depth, keys_in, read_manifest
from layerpeft.saving.whole import refusal, writing_whole
from layerpeft.text import note
from layerpeft.training.method import Fold
from layerpeft.training.record import read_record
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.layer_weights import Asked, LayerWeights, weighed
from layerpeft.tuners.load import (
    adapter_config,
    check_chosen,
    check_named,
    check_stock,
    classes_of,
    kind_of,
    load_stock,
    load_verified,
)
from layerpeft.tuners.merge_files import NotPiecewise, plan_merge, without_bias, write_merged

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
BESIDE = (*TOKENIZER, "labels.json")
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # of a base on the hub


def merge(
    folder: str | os.PathLike[str],
    into: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    into_quantized: bool = False,
    weights: Asked | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Writes the base model with the adapter of `folder` merged into its weights, in their dtype, and the tokenizer beside it.

    `model`, or `base`, its folder or name: where the adapter does not say where it is; `dtype`: of the weights, the base's own
    without it; `kwargs` go to `from_pretrained`. A base in safetensors is read and written module by module; the peak is one file
    of it. `into_quantized`: the base is quantized and stays so, its weights rounded once more. `weights`: by how much what was
    trained in a layer counts (`LayerWeights.parse`): base + w · change, 1 where nothing is said. The target folder must be empty
    or new, or with `overwrite` an earlier merge or export, whose files are replaced; it is written last, at once.
    Raises: SaveError for a damaged adapter, a base that does not fit or is quantized, or a folder that holds something; ConfigError
    for weights of layers that are not there.
    """
    target = Path(into)
    reads = (folder, base or (named_base(Path(folder)) if model is None else None))
    if why := refusal(target, overwrite, reads):
        raise SaveError(why)
    with writing_whole(target, "merge") as partial:
        merge_into(
            folder, partial, model, base=base, dtype=dtype, into_quantized=into_quantized, weights=weights, **kwargs
        )
    return target


def named_base(folder: Path) -> str | None:
    """The base that an adapter names; None where it does not say so, whatever the reason."""
    try:
        named = read_json(folder / CONFIG).get("base_model_name_or_path")
    except SaveError:
        return None
    return named if isinstance(named, str) else None


def merge_into(
    folder: str | os.PathLike[str],
    empty: Path,
    model: nn.Module | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    into_quantized: bool = False,
    weights: Asked | None = None,
    **kwargs: Any,
) -> None:
    """What `merge` does, in a folder that is empty."""
    source = Path(folder)
    how = _how(source, weights)
    config = adapter_config(source)
    if model is None:
        cure = "say where it is: --base MODEL, base=…" if base is None else "name another one"
        check_named(source, base or config.get("base_model_name_or_path"), cure)
    where = None if model is not None else folder_of(base or config.get("base_model_name_or_path"), config, kwargs)
    if into_quantized:
        how.refuse_quantized(config)
    if model is None and dtype is not None:
        kwargs["dtype"] = dtype
    if model is None:
        kwargs = classes_of(source, kwargs)
    _check_base(where, model, into_quantized)
    beside, parts = files_beside(source, where), _parts(source)
    if how.rounded and not into_quantized:
        note(
            "the adapter was trained over a base that was rounded to fewer bits, and is merged into the unrounded one: what it "
            "computes differs by the rounding"
        )
    if into_quantized:
        _merge_quantized(source, where, model, config, kwargs, empty, how)
    elif where is None or not _merge_files(source, where, config, base is not None, kwargs, empty, how):
        _merge_whole(source, model, base, config, kwargs, empty, how)
    for file in beside:
        shutil.copyfile(file, empty / file.name)
    for name in parts:
        (empty / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(source / name, empty / name)


@dataclass(frozen=True)
class _How:
    """What kind of adapter it is, chosen in which stack, over a base that was `rounded` or not; how it goes into one module, where
    not as PEFT does it; how much of it counts, by layer; and whether there is a record of it."""

    kind: type[LayerLoraConfig]
    stack: str | None
    rounded: bool
    fold: Fold | None
    weights: LayerWeights | None
    recorded: bool = True

    @property
    def load(self) -> Callable[..., Any]:
        return load_verified if self.recorded else load_stock

    def refuse_quantized(self, config: Mapping[str, Any]) -> None:
        """Raises: SaveError for what is not merged into a quantized base."""
        if self.weights is not None:
            raise SaveError("weights of layers are for a base in 16 bit or more: leave out into_quantized, or weights")
        if config.get("lora_bias") or self.kind.works_by.restates:
            raise SaveError(
                "the adapter holds biases, which PEFT does not merge into a quantized base: merge it into one in 16 bit, without "
                "into_quantized"
            )


def _how(source: Path, weights: Asked | None) -> _How:
    """Raises: SaveError for a damaged folder; ConfigError for weights that cannot be read."""
    asked = LayerWeights.parse(weights) if weights is not None else None
    if not (source / MANIFEST).is_file():
        check_stock(source)
        _check_mergeable(source)
        return _How(LayerLoraConfig, None, False, None, asked, recorded=False)
    manifest = read_manifest(source)
    check_chosen(source, read_record(manifest))
    kind = kind_of(str(manifest.get("method")))
    stack, rounded = (manifest.get("selection") or {}).get("stack"), manifest.get("quant") is not None
    return _How(kind, stack, rounded, kind.works_by.fold(source), asked)


def _check_mergeable(source: Path) -> None:
    """Raises: SaveError for an adapter of plain PEFT's that changes no weight."""
    config: Any = peft.PeftConfig.from_pretrained(str(source.absolute()))
    if not changes_weights(config.peft_type):
        raise SaveError(
            f"{source} is an adapter of the kind {config.peft_type.value}, which adds to what the model reads and changes no "
            "weight: there is nothing to merge"
        )


def _merge_files(
    source: Path,
    where: Path,
    config: Mapping[str, Any],
    named: bool,
    kwargs: Mapping[str, Any],
    partial: Path,
    how: _How,
) -> bool:
    """Merges module by module, and says whether that could be done. `named`: the base was given, with no word of its tokenizer."""
    options = {k: v for k, v in kwargs.items() if k not in ("dtype", "revision", "ignore_mismatched_sizes")}
    try:
        with as_written("it cannot be read piece by piece", NotPiecewise):
            model = MODELS.get(config.get("task_type") or "")
            plan = plan_merge(source, where, model, kwargs.get("dtype"), options, how.fold, how.weights, how.stack)
            if how.recorded:
                check_depth(read_manifest(source), plan.model.config, str(where))
            if not named and _more_words(source, plan.model):
                raise NotPiecewise("the tokenizer has more words than the base")
    except NotPiecewise as why:
        note(f"the base is loaded whole, and the adapter is merged in memory: {why}")
        return False
    write_merged(plan, partial)
    return True


def _merge_whole(
    source: Path,
    model: nn.Module | None,
    base: Any,
    config: Mapping[str, Any],
    kwargs: dict[str, Any],
    partial: Path,
    how: _How,
) -> None:
    """Merges in memory."""
    if model is None and base is not None:
        model, kwargs = _base(source, base, config, kwargs), {}
    try:
        loaded: Any = how.load(source, model, **kwargs)
    except SaveError as error:
        if model is not None:
            raise
        raise SaveError(f"{error}\nOr say where it is: --base MODEL, base=…") from error
    _refuse(_packed_names(loaded))
    untie(loaded)
    if how.kind.works_by.restates:
        how.kind.loaded(loaded.base_model.model, "default", loaded.peft_config["default"], False, source)
    if bare_ones := without_bias(loaded, keys_in(source)):
        give_biases(base_of(loaded), bare_ones)
    if how.weights is not None:
        if not how.kind.works_by.restates and config.get("bias") not in (None, "none"):
            raise SaveError(
                f"bias={config['bias']!r}: the base was not read tensor by tensor, and its biases are not known any more"
            )
        weight_of = how.weights.placed(layer_map(loaded, how.stack).names)
        with torch.no_grad():
            weigh(loaded, lambda name: None if weight_of(name) == 1 else partial_of(weighed, weight=weight_of(name)))
    with torch.no_grad(), as_written(f"{source} cannot be merged into its base"):
        merged: Any = loaded.merge_and_unload(safe_merge=True)
    merged.save_pretrained(partial)


def _merge_quantized(
    source: Path,
    where: Path | None,
    model: Any,
    config: Mapping[str, Any],
    kwargs: dict[str, Any],
    partial: Path,
    how: _How,
) -> None:
    """Merges into quantized weights, and says what the rounding cost."""
    if model is None and where is not None:
        model = load_saved(where) if is_saved(where) else _base(source, where, config, kwargs)
    assert model is not None  # one of the two was found to be quantized
    keep_cpu_layout(model)
    loaded: Any = how.load(source, model)
    untie(loaded)
    with torch.no_grad():
        errors = merge_in_place(loaded)
    if errors:
        worst = max(errors, key=errors.__getitem__)
        note(
            f"merged into {len(errors)} quantized linears, which were rounded once more: the error is "
            f"{statistics.median(errors.values()):.0%} of the change that was trained (median; {errors[worst]:.0%} in {worst})"
        )
    save_model(loaded.unload(), partial)


def folder_of(name: Any, config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Path | None:
    """The folder of a full model, taken from the hub if need be; None where it is not to be had, which loading will say better."""
    if not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    revision = kwargs.get("revision") or config.get("revision")
    try:
        return Path(snapshot_download(os.fspath(name), revision=revision, allow_patterns=FILES))
    except Exception:  # no network, no such name, no name at all: whichever it is, from_pretrained explains it
        return None


def _check_base(where: Path | None, model: nn.Module | None, into_quantized: bool) -> None:
    """Raises: SaveError for a quantized base that was not asked for, and for asking where there is none."""
    named: list[str] = []
    if model is not None:
        named = _packed_names(model)
    elif where is not None:
        path = where / "config.json"
        found = read_json(path) if path.is_file() else {}
        parts = [found, *(v for v in found.values() if isinstance(v, dict))]
        if is_saved(where) or any(part.get("quantization_config") for part in parts):
            named = [os.fspath(where)]
    if into_quantized and not named:
        raise SaveError("the base is not quantized: leave out into_quantized")
    if not into_quantized:
        _refuse(named)


def _packed_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if not p.is_floating_point()]


def _refuse(packed: list[str]) -> None:
    """Raises: SaveError naming one of these."""
    if packed:
        raise SaveError(
            f"the base is quantized ({packed[0]}{f' and {len(packed) - 1} more' if len(packed) > 1 else ''}), and merging would "
            "round what was trained; give the base in 16 bit: merge(folder, into, model=AutoModelForCausalLM.from_pretrained(…)) "
            "or base=…, or ask for it: into_quantized=True (--into-quantized)"
        )


def _more_words(source: Path, model: Any) -> bool:
    """Whether PEFT would make the embeddings larger for the adapter's tokenizer."""
    if not (source / "tokenizer_config.json").is_file():
        return False
    try:
        words = len(transformers.AutoTokenizer.from_pretrained(source))
        return words > model.get_input_embeddings().weight.shape[0]
    except (OSError, ValueError, NotImplementedError):
        return True  # whatever it is, loading the whole finds it


def files_beside(source: Path, where: Path | None) -> list[Path]:
    """The tokenizer that was saved with the adapter, or else the base's, and the names of classes.

    Raises: SaveError for a link that leads out of their folder.
    """
    own = any((source / n).is_file() for n in TOKENIZER)
    found = [source / n if own or n not in TOKENIZER or where is None else where / n for n in BESIDE]
    found = [file for file in found if file.is_file()]
    links = [file for file in found if not inside(file, file.parent)]
    if links:
        raise SaveError(
            f"{links[0]} is a link to {links[0].resolve()}, outside of its folder: put the file itself there"
        )
    return found


def _parts(source: Path) -> list[str]:
    """What sentence-transformers has beside a transformer. Raises: SaveError for a link that leads out of the folder."""
    found = parts_in(source)
    if links := [name for name in found if not inside(source / name, source)]:
        raise SaveError(f"{source / links[0]} is a link that leads out of {source}: put the file itself there")
    return found


def _base(source: Path, base: Any, config: Mapping[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    kind = class_named(config)
    if kind is None or not hasattr(transformers, kind):
        raise SaveError(f"{source} names no model class that transformers has; give the model itself: merge(…, model)")
    name = os.fspath(base)
    lost = not os.path.exists(name)
    with as_written(
        f"the base model: {neither('folder', name)}" if lost else f"the base model {name!r} cannot be loaded"
    ):
        return getattr(transformers, kind).from_pretrained(os.fspath(base), **{"trust_remote_code": False} | kwargs)
