"""Fewer bits by layer, without training: `quantize`; and what PEFT says to a `LayerQuantConfig` that is given to it alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from layerpeft.allotting import allot
from layerpeft.errors import ConfigError, QuantizationError
from layerpeft.integrations.peft import LayerPeftType, register
from layerpeft.quant_config import LayerQuantConfig
from layerpeft.quant_training import applied
from layerpeft.quantizing import Quantized
from layerpeft.save import MANIFEST

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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QuantizationError(f"no record of precisions at {path}: {error}") from error
    found = data.get("quant") if isinstance(data, dict) else None
    if found is None:
        raise QuantizationError(f"{path} records no precisions: its base was not quantized by layer")
    return Quantized.from_dict(found)


register(LayerPeftType.LAYER_QUANT, LayerQuantConfig, LayerQuantModel, "lora_")
