"""Gradient projection on the chosen layers: LoRA modules with one factor fixed, and a refresher that renews it."""

from __future__ import annotations

from torch import nn

from layerpeft.integrations.peft import LayerPeftType, register, watch_loading
from layerpeft.tuners.galore.config import LayerGaloreConfig, project_all
from layerpeft.tuners.galore.refresh import Refresher
from layerpeft.tuners.model import LayerLoraModel
from layerpeft.tuners.stock import RecordedLoraConfig


class LayerGaloreModel(LayerLoraModel):
    """Resolves the choice, lets PEFT wrap it as LoRA, and turns those modules into projected ones."""

    def _prepared(self, model: nn.Module, live: RecordedLoraConfig, adapter_name: str) -> Refresher:
        watch_loading()
        project_all(model, live, adapter_name, self._layerpeft_prepared.examined.targets)
        config: LayerGaloreConfig = live._layerpeft_projection  # type: ignore[attr-defined]
        return Refresher(config.refreshing)


register(LayerPeftType.LAYER_GALORE, LayerGaloreConfig, LayerGaloreModel, "lora_")
