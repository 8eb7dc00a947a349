"""Gradient projection on the chosen layers: LoRA modules with one factor fixed, and a refresher that renews it."""

from __future__ import annotations

from typing import Any

from torch import nn

from layerpeft.configs import RecordedLoraConfig
from layerpeft.folds import Folds
from layerpeft.galore_config import LayerGaloreConfig
from layerpeft.integrations.peft import LayerPeftType, lora_layers, register, watch_loading
from layerpeft.layers import layer_map
from layerpeft.projected import Projection, project
from layerpeft.refresh import Refresher
from layerpeft.subspace import side_of
from layerpeft.tuners.lora import LayerLoraModel


class LayerGaloreModel(LayerLoraModel):
    """Resolves the choice, lets PEFT wrap it as LoRA, and turns those modules into projected ones."""

    def _prepared(self, model: nn.Module, live: RecordedLoraConfig, adapter_name: str) -> Refresher:
        watch_loading()
        config: LayerGaloreConfig = live._layerpeft_projection  # type: ignore[attr-defined]
        select = live._layerpeft.config["select"]  # type: ignore[attr-defined]
        shapes = {t.name: t.shape for t in layer_map(model, select.get("stack")).targets}
        for name, layer in lora_layers(model, adapter_name).items():
            name = name.removeprefix("_orig_mod.")
            out, into = shapes[name]
            side = side_of(config.proj_type, out, into)
            state = Projection(
                name, adapter_name, side, config.scale, config.fold, config.seed, Folds(out, into), config.update_proj_gap
            )  # fmt: skip
            project(layer, state)
        return Refresher(config.refreshing, select.get("stack"))


def _registered() -> Any:
    return register(LayerPeftType.LAYER_GALORE, LayerGaloreConfig, LayerGaloreModel, "lora_")


_registered()
