"""Offsets of chosen attention heads (LoFiT): its config, and what PEFT sees of it."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn

from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations.peft import LayerPeftType, lora_layers
from layerpeft.model.heads import HEAD, holder, place_of
from layerpeft.model.layers import LayerMap, Target
from layerpeft.model.names import clean
from layerpeft.model.units import heads_in
from layerpeft.selection.examined import Examined
from layerpeft.selection.select import Selection
from layerpeft.selection.typecheck import checked
from layerpeft.training.method import Method
from layerpeft.tuners.beside import read_beside
from layerpeft.tuners.config import LayerLoraConfig, options_given
from layerpeft.tuners.head import layer
from layerpeft.tuners.head.method import FILE, HeadMethod
from layerpeft.tuners.stock import Recorded, stock_config

# LoRA's options that mean the same here; every other one is refused unless it is left alone
SHARED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save", "ensure_weight_tying",
}  # fmt: skip
FIXED = {"r": 1, "lora_alpha": 1, "lora_bias": True}  # what the saved folder is as LoRA


@dataclass
class LayerHeadConfig(LayerLoraConfig):
    """Trains a vector that is added to the output of each chosen attention head, before the projection (LoFiT, arXiv 2406.01563).

    `select` chooses heads (`unit: head`; all query heads of a layer count, whatever they share keys and values with), or whole
    layers with all their heads. An offset v of head h adds `W[:, h] v` to the output of the projection W, so what is saved is a
    stock LoRA adapter of rank 1, both factors zero, with that as its bias. `init_std`: spread of the normal values that offsets
    begin with; 0 leaves the model as it is (the paper: 1e-3). LoRA's other options have no meaning here.
    Raises: ConfigError naming every problem at once.
    """

    r: int = checked(1, "Of the saved adapter, always 1.")
    lora_alpha: int = checked(1, "Of the saved adapter, always 1.")
    lora_bias: bool = checked(True, "Of the saved adapter, always true.")
    init_std: float = checked(0.0, "Spread of the random values that offsets begin with. Default: zeros.", least=0)
    seed: int = checked(0, "Of those.")
    kind: ClassVar[enum.Enum] = LayerPeftType.LAYER_HEAD
    method: ClassVar[str] = "head"
    works_by: ClassVar[type[Method]] = HeadMethod
    units: ClassVar[tuple[str, ...]] = ("layer", HEAD)

    def refuse(self, problems: Problems) -> None:
        """Adds LoRA's own options, and packing what a head lies in by that head."""
        given = [n for n in options_given(self, SHARED) if n not in FIXED]
        for name in given + [n for n, value in FIXED.items() if getattr(self, n) != value]:
            problems.add(f"{name}={getattr(self, name)!r}: LoRA's own, without a meaning for offsets of heads", name)
        if self.quantize_trained is not None:
            problems.add(
                f"quantize_trained={self.quantize_trained!r}: no weight trains, so that all of them are frozen ones; write "
                "quantize_frozen",
                "quantize_trained",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without LoRA's own options."""
        left_out = {f.name for f in fields(LoraConfig)} - SHARED
        return {k: v for k, v in super().to_dict().items() if k not in left_out}

    def resolve(self, model: nn.Module, batches: Iterable[Any] | None = None, *, progress: bool = True) -> LoraConfig:
        """Never: a stock config would train factors. Raises: ConfigError."""
        raise ConfigError(
            "offsets of heads have no stock config that trains the same: give the config itself to get_peft_model or to a "
            "trainer's peft_config="
        )

    def targets_in(self, model: nn.Module, layers: LayerMap) -> tuple[Target, ...]:
        """Every head of these layers. Raises: ConfigError where there are none that can be told apart."""
        return heads_in(layers)

    def stock_for(self, model: nn.Module, selection: Selection, examined: Examined) -> Recorded:
        """LoRA of rank 1 on the projections of the chosen heads, with the record of these. Raises: ConfigError."""
        projections = {t.name: t for t in (replace(t, name=holder(t.name)) for t in examined.targets)}
        held = dict.fromkeys(map(holder, selection.targets))
        stock = stock_config(self, model, replace(selection, targets=tuple(held)), tuple(projections.values()))
        stock._layerpeft.selection = selection
        return stock

    @classmethod
    def loaded(cls, model: nn.Module, adapter: str, live: Any, trains: bool, folder: Path) -> Method:
        """The offsets that lie in the folder, in the place of the constants that PEFT has read."""
        saved = read_beside(folder, FILE)
        for name, module in lora_layers(model, adapter).items():
            own = {place[1]: v for n, v in saved.items() if (place := place_of(n)) and place[0] == clean(name)}
            size = len(next(iter(own.values())))
            for head, offset in layer.place(module, adapter, own, size, inference=not trains).items():
                offset.data.copy_(own[head])
        method = HeadMethod(model, adapter, live)
        method.watch()
        return method
