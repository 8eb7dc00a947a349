"""Layer-selective fine-tuning for PEFT: layers are picked by evidence, wrapped with LoRA, and the rest stays frozen."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import peft
from torch import nn

from layerpeft.errors import LayerMapError, LayerpeftError
from layerpeft.model.layers import LayerMap, layer_map
from layerpeft.planning.plan import Plan, plan
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.config import LayerQuantConfig
from layerpeft.quantization.quantize import quantize
from layerpeft.quantization.save import save_model
from layerpeft.saving.checkpoints import last_checkpoint
from layerpeft.selection.scores import Scores
from layerpeft.selection.scoring import score_layers
from layerpeft.selection.select import Select, Selection
from layerpeft.training import backward
from layerpeft.training.report import layer_report
from layerpeft.training.steps import check_trained
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.full import model as _full  # noqa: F401 - importing a tuner registers it with PEFT
from layerpeft.tuners.full.config import LayerFullConfig
from layerpeft.tuners.galore import model as galore  # noqa: F401
from layerpeft.tuners.galore.config import LayerGaloreConfig
from layerpeft.tuners.load import load, load_model, save_record

__version__ = "0.1.0"
__all__ = [
    "LayerFullConfig",
    "LayerGaloreConfig",
    "LayerLoraConfig",
    "LayerMap",
    "LayerQuantConfig",
    "LayerpeftError",
    "Plan",
    "Quantized",
    "Scores",
    "Select",
    "Selection",
    "check_trained",
    "get_peft_model",
    "last_checkpoint",
    "layer_map",
    "layer_report",
    "load",
    "load_model",
    "plan",
    "quantize",
    "save_model",
    "save_record",
    "score_layers",
]


def get_peft_model(
    model: nn.Module, peft_config: peft.PeftConfig, *args: Any, batches: Iterable[Any] | None = None, **kwargs: Any
) -> peft.PeftModel | peft.PeftMixedModel:
    """`peft.get_peft_model`, which also takes `batches` for configs that pick layers by data.

    Stock configs pass untouched; where they leave the lowest layers frozen, the backward pass stops above those too.

    `batches`: any iterable of model inputs with labels. Raises: what the config's choice raises; LayerpeftError for
    `batches` together with a config that picks no layers.
    """
    if batches is not None:
        if not isinstance(peft_config, LayerLoraConfig):
            raise LayerpeftError(f"batches= is for configs that pick layers; {type(peft_config).__name__} does not")
        peft_config = peft_config.with_batches(batches)
    wrapped = peft.get_peft_model(model, peft_config, *args, **kwargs)
    with suppress(LayerMapError):  # a model without repeated blocks has no layer to stop at
        backward.install(wrapped)
    return wrapped
