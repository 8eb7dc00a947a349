"""Training the weights themselves of chosen layers: its config, and what PEFT sees of it."""

import copy
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn

from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations import distributed
from layerpeft.integrations.peft import DUMMY_TARGET_MODULES, LayerPeftType
from layerpeft.model.layers import LayerMap, Target, base_of
from layerpeft.model.new_modules import new_modules
from layerpeft.model.stacked import picked_in
from layerpeft.quantization.config import LayerQuantConfig
from layerpeft.selection.examined import Examined
from layerpeft.selection.select import Selection
from layerpeft.selection.typecheck import checked
from layerpeft.training.method import Method
from layerpeft.training.record import Record
from layerpeft.tuners.config import LayerLoraConfig, options_given
from layerpeft.tuners.full.layer import Whole, adopt
from layerpeft.tuners.full.method import FullMethod
from layerpeft.tuners.full.targets import Wanted, always_modules, whole_targets, wholes_of
from layerpeft.tuners.stock import RecordedLoraConfig, plain_config

# LoRA's options that mean something here; every other one is refused unless it is left alone
SHARED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save",
}  # fmt: skip


@dataclass
class LayerFullConfig(LayerLoraConfig):
    """Trains the weights themselves of chosen layers, in place (LISA, BAdam, Spectrum, Telly), and saves those that changed.

    `target_modules`: None for every weight of a chosen layer (linears, norms, experts, routers), or names as in LoRA of linears,
    norms, of modules around them (`mlp`) or of single parameters; `exclude_modules` in the same words. `biases`: False leaves
    biases frozen. `modules_to_save`: modules that train whatever is chosen (embeddings, the head, the last norm), which stay
    frozen otherwise. `master_weights`: 16-bit weights are updated through a float32 copy; in one process only.
    LoRA's other options have no meaning here. Raises: ConfigError naming every problem at once.
    """

    biases: bool = checked(True, "Train the biases of the chosen modules.")
    master_weights: bool = checked(False, "A float32 copy of 16-bit weights to update.")
    kind: ClassVar[enum.Enum] = LayerPeftType.LAYER_FULL
    method: ClassVar[str] = "full"
    works_by: ClassVar[type[Method]] = FullMethod

    def refuse(self, problems: Problems) -> None:
        """Adds LoRA's own options, and what cannot be done to weights that train themselves."""
        for name in options_given(self, SHARED):
            problems.add(
                f"{name}={getattr(self, name)!r}: LoRA's own, without a meaning where the weights themselves train",
                name,
            )
        if self.quantize_trained is not None:
            problems.add(
                f"quantize_trained={self.quantize_trained!r}: weights that are quantized cannot be trained themselves",
                "quantize_trained",
            )
        if isinstance(self.quant, Mapping | LayerQuantConfig):
            part = self.quant.apply_to if isinstance(self.quant, LayerQuantConfig) else self.quant.get("apply_to")
            if part != "frozen":
                problems.add(
                    "quant: weights that are quantized cannot be trained themselves; write apply_to: frozen", "quant"
                )
        if self.master_weights is True and distributed.world_size() > 1:
            problems.add(
                "master_weights=True works in one process only: what splits or copies the weights over processes keeps its own "
                "master copy (FSDP's MixedPrecision, DeepSpeed's bf16), so leave it out and load the weights in float32 for those",
                "master_weights",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without LoRA's own options."""
        left_out = {f.name for f in fields(LoraConfig)} - SHARED
        return {k: v for k, v in super().to_dict().items() if k not in left_out}

    def resolve(self, model: nn.Module, batches: Iterable[Any] | None = None, *, progress: bool = True) -> LoraConfig:
        """Never: a stock config would train copies of the modules. Raises: ConfigError."""
        raise ConfigError(
            "training the weights themselves has no stock config that means the same: give the config itself to get_peft_model or "
            "to a trainer's peft_config=, on a model without other adapters"
        )

    @classmethod
    def loaded(cls, model: nn.Module, adapter: str, live: Any, trains: bool, folder: Path) -> Method:
        """PEFT's copies of the modules are those that train from now on."""
        selection = live._layerpeft.selection
        if selection is not None:
            biases, single = live._layerpeft.config.get("biases", True), picked_in(model, selection.targets)
            adopt(model, adapter, selection.layer_names, biases, single)
        return FullMethod(model, adapter, live)

    def wanted(self, base: nn.Module) -> Wanted:
        """What is asked for, new heads among the modules that are always on."""
        born = new_modules(base) if self.train_new else ()
        listed = list(self.modules_to_save or ())
        always = listed + [n for n in born if not any(n == k or n.endswith(f".{k}") for k in listed)]
        return Wanted(self.target_modules, self.exclude_modules, self.biases, tuple(always))

    def targets_in(self, model: nn.Module, layers: LayerMap) -> tuple[Target, ...]:
        """All modules that this config would train whole in any layer. Raises: SelectionError, ConfigError."""
        base = base_of(model)
        return whole_targets(base, layers, self.wanted(base))

    def stock_for(self, model: nn.Module, selection: Selection, examined: Examined) -> RecordedLoraConfig:
        """LoRA without a target, and the modules as PEFT's modules_to_save; with the record. Raises: ConfigError."""
        base = base_of(model)
        wanted, chosen = self.wanted(base), set(selection.targets)
        layers = examined.layers
        held = [replace(t, layer=layers.block(t.layer).index) for t in examined.targets if t.name in chosen]
        wholes = wholes_of(base, layers.whole, wanted, held)
        shared = {n: copy.deepcopy(getattr(self, n)) for n in ("task_type", "base_model_name_or_path", "revision")}
        stock = RecordedLoraConfig(
            target_modules=DUMMY_TARGET_MODULES,
            modules_to_save=[w.name for w in wholes],
            inference_mode=self.inference_mode,
            **shared,
        )
        always = always_modules(base, wanted)
        born = tuple(n for n in (new_modules(base) if self.train_new else ()) if n in always)
        found = FullRecord(
            plain_config(self), self.method, selection, new_tensors=born, asked=self.bare(), wholes=wholes
        )
        return stock.recorded(found)


@dataclass
class FullRecord(Record):
    """With what is to be wrapped."""

    wholes: tuple[Whole, ...] = field(default=(), compare=False, repr=False)
