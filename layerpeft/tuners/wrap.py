"""`get_peft_model` with batches."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import peft
from torch import nn

from layerpeft.errors import LayerMapError, LayerpeftError
from layerpeft.integrations.peft import watch_keys
from layerpeft.model.names import adapted
from layerpeft.model.patterns import check_patterns
from layerpeft.training import backward
from layerpeft.tuners.config import LayerLoraConfig


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
    if isinstance(peft_config, LayerLoraConfig) and peft_config.is_plain:  # any other is looked at where it chooses
        check_patterns(peft_config, (name for name, _ in model.named_modules()))
    watch_keys(adapted)
    wrapped = peft.get_peft_model(model, peft_config, *args, **kwargs)
    with suppress(LayerMapError):  # a model without repeated blocks has no layer to stop at
        backward.install(wrapped)
    return wrapped
