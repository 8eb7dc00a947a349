"""The weights themselves of the chosen layers: wrappers that are there before PEFT looks for modules to copy."""

from __future__ import annotations

from typing import Any

from torch import nn

from layerpeft.integrations.peft import LayerPeftType, register
from layerpeft.tuners.full.config import FullLoraConfig, LayerFullConfig, opened, place_all
from layerpeft.tuners.model import LayerLoraModel
from layerpeft.tuners.stock import RecordedLoraConfig


class LayerFullModel(LayerLoraModel):
    """Resolves the choice, puts wrappers round the chosen modules, and lets PEFT find them there."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        live = self.peft_config[adapter_name]
        if isinstance(live, FullLoraConfig):
            place_all(model, live, adapter_name)

    def _prepared(self, model: nn.Module, live: RecordedLoraConfig, adapter_name: str) -> None:
        opened(model, live, adapter_name)


register(LayerPeftType.LAYER_FULL, LayerFullConfig, LayerFullModel, "lora_")
