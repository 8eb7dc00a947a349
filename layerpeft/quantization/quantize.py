"""Fewer bits by layer, without training: `quantize`; and what PEFT says to a `LayerQuantConfig` that is given to it alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from layerpeft.errors import ConfigError, QuantizationError
from layerpeft.integrations.files import read_json
from layerpeft.integrations.peft import LayerPeftType, register
from layerpeft.integrations.places import meant
from layerpeft.model.home import home_of, known_of
from layerpeft.model.layers import base_of
from layerpeft.quantization import apply
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.assign import allot
from layerpeft.quantization.config import LayerQuantConfig
from layerpeft.saving.manifest import MANIFEST
from layerpeft.text import note


def applied(model: nn.Module, wanted: Quantized, *, marked: bool = True) -> Quantized:
    """Stores everything so that is not yet, keeps that on the model, and says what came of it. Raises: QuantizationError."""
    known: Quantized | None = known_of(base_of(model)).quantized
    again = known is not None and dict(known.modules) == dict(wanted.modules)  # `load_model` has said so
    more: dict[str, Any] = {"left": wanted.left, "why": wanted.why, "choice": wanted.choice}
    done = apply.apply(model, wanted.modules, wanted.storage, marked=marked, **more)
    home_of(base_of(model)).quantized = done
    if not again:
        note(f"quantized: {done.why}\n{done.table()}")
    return done


ALONE = (
    "LayerQuantConfig says how layers are stored, and trains nothing. Give it to a training config, as in "
    "LayerLoraConfig(select='last:4', quant=LayerQuantConfig(select='all', bits=4)), or store the model so and go on with it: "
    "layerpeft.quantize(model, LayerQuantConfig(select='all', bits=4))"
)


class LayerQuantModel(nn.Module):
    """Never built: there is nothing to wrap."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConfigError(ALONE)


def quantize(
    model: nn.Module,
    config: LayerQuantConfig | Mapping[str, Any] | Quantized | str | os.PathLike[str],
    *,
    batches: Iterable[Any] | None = None,
    progress: bool = True,
) -> Quantized:
    """Stores linears of a live model in fewer bits, in place, one after the other; the peak is the model plus one linear.

    `config`: a `LayerQuantConfig` or a dict; or what was done before (a `Quantized`, or the folder or file that records it), to do
    the same again. `batches`: model inputs with labels, where bits are given by what data say. Returns the table of what was
    asked and got; print it. Raises: ConfigError, SelectionError, ScoreError, QuantizationError.
    """
    if isinstance(config, str | os.PathLike):
        config = recorded(config)
    if isinstance(config, Quantized):
        return applied(model, config)
    spec = LayerQuantConfig.parse(config)
    given = batches if batches is not None else spec._batches
    return applied(model, allot(spec, model, given, progress=progress))


def recorded(place: str | os.PathLike[str]) -> Quantized:
    """The precisions that a folder of an adapter, or its `layerpeft.json`, records. Raises: QuantizationError."""
    path = Path(place)
    path = path / MANIFEST if path.is_dir() else path
    if not path.exists():
        raise QuantizationError(f"no record of precisions at {path}: there is no such file{meant(path)}")
    found = read_json(path, QuantizationError).get("quant")
    if found is None:
        raise QuantizationError(f"{path} records no precisions: its base was not quantized by layer")
    return Quantized.from_dict(found)


register(LayerPeftType.LAYER_QUANT, LayerQuantConfig, LayerQuantModel, "lora_")
