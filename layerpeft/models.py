"""Loading a base model in the precisions it will be used in, where these can be known before a weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from layerpeft import quantizing, save
from layerpeft.allotting import allot, decided_early
from layerpeft.assume import fixed
from layerpeft.choose import needs
from layerpeft.configs import LayerLoraConfig
from layerpeft.errors import ConfigError, SaveError, unknown
from layerpeft.layers import base_of
from layerpeft.loading import load_quantized
from layerpeft.merge import MODELS
from layerpeft.notes import note
from layerpeft.precisions import KEPT, precision_of
from layerpeft.quant_config import LayerQuantConfig
from layerpeft.quant_save import is_saved, load_saved
from layerpeft.quant_training import applied, asked, decides_early, names_of
from layerpeft.quantizing import Quantized
from layerpeft.selection import Select

Wish = LayerLoraConfig | LayerQuantConfig | Quantized | Mapping[str, Any]
PEFT_OPTIONS = (
    "adapter_name", "config", "autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "key_mapping",
)  # fmt: skip
ARCHITECTURE = ("num_labels", "id2label", "label2id", "trust_remote_code", "code_revision", "cache_dir", "token")


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
    model = load_quantized(name, {}, quantizing.PLAIN, kind=kind, progress=progress, **options)
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
        quantizing.apply(model, wanted.modules, wanted.storage)
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
    select = Select.parse(config.select)
    if select.is_scheduled or needs(select) == "nothing":
        model = empty()
        choice = fixed(config, model)[0]._layerpeft.selection  # type: ignore[attr-defined]
        return asked(config, model, names_of(model, choice.stack, choice.layers))
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
        kept = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        kept = kept or getattr(config, "dtype", None) or torch.float32
        trusted = {k: v for k, v in options.items() if k == "trust_remote_code"}
        made = getattr(transformers, kind)
        with torch.device("meta"):
            make = getattr(made, "from_config", None) or made._from_config  # of an Auto class, or of a model's own
            return base_of(make(config, dtype=kept, **trusted))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"no model can be built from {os.fspath(name)!r}: {' '.join(str(error).split())[:300]}"
        ) from error


# ---- under a saved adapter ------------------------------------------------------------------------------------------


def stored_base(folder: str | os.PathLike[str], given: Mapping[str, Any]) -> tuple[nn.Module | None, dict[str, Any]]:
    """The base of a saved adapter, quantized as it was when that trained, and what of `given` is left for PEFT.

    None where the base was not quantized by layer. Raises: SaveError where it does not say which base, or that cannot be had.
    """
    stored = save.read_manifest(folder).get("quant")
    config = json.loads((Path(folder) / save.CONFIG).read_text(encoding="utf-8"))
    base, task = config.get("base_model_name_or_path"), config.get("task_type")
    for_peft = {k: v for k, v in given.items() if k in PEFT_OPTIONS}
    for_base = {k: v for k, v in given.items() if k not in PEFT_OPTIONS}
    if base and is_saved(base):
        return load_saved(base, **for_base), for_peft
    if stored is None:
        return None, dict(given)
    wanted = Quantized.from_dict(stored)
    kind = MODELS.get(task) or (config.get("auto_mapping") or {}).get("base_model_class")
    if not base or not hasattr(transformers, str(kind)):
        raise SaveError(
            f"{folder} does not say which base it was trained on, or of which class; give it: load({os.fspath(folder)!r}, model)"
        )
    options: dict[str, Any] = {"dtype": wanted.dtype or None} | for_base
    labels = Path(folder) / "labels.json"  # a recipe's classes
    if labels.is_file():
        options.setdefault("num_labels", len(json.loads(labels.read_text(encoding="utf-8"))))
    try:
        return load_model(base, wanted, kind=str(kind), **options), for_peft
    except (OSError, ValueError) as error:
        raise SaveError(f"the base model {base!r} of {folder} cannot be loaded: {error}") from error


def quantized_linears(model: nn.Module) -> bool:
    """Whether any linear of the model is stored in fewer bits."""
    return any(hasattr(m, "in_features") and precision_of(m) != KEPT for m in model.modules())
