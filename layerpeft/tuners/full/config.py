"""Training the weights themselves of chosen layers: its config, and what PEFT sees of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn

from layerpeft.errors import ConfigError, LayerMapError, Problems
from layerpeft.integrations import distributed
from layerpeft.integrations.peft import DUMMY_TARGET_MODULES, LayerPeftType
from layerpeft.model.layers import LayerMap, Target, base_of
from layerpeft.model.new_modules import new_modules
from layerpeft.quantization.config import LayerQuantConfig
from layerpeft.saving import manifest
from layerpeft.selection.examined import Examined
from layerpeft.selection.select import Selection
from layerpeft.selection.typecheck import check, checked
from layerpeft.text import note, size_text
from layerpeft.training import backward
from layerpeft.training.record import LiveRecord
from layerpeft.tuners.config import LayerLoraConfig, options_given
from layerpeft.tuners.full.layer import open_all, place, saved_modules, wrappers
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
    kind: ClassVar[LayerPeftType] = LayerPeftType.LAYER_FULL
    method: ClassVar[str] = "full"

    def __post_init__(self, batches: Iterable[Any] | None = None) -> None:
        problems = Problems("LayerFullConfig")
        check(type(self), vars(self), problems)
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
        problems.raise_if_any(ConfigError)
        super().__post_init__(batches)

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

    @property
    def is_plain(self) -> bool:
        """Never: with all layers it is the weights themselves still."""
        return False

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

    def stock_for(self, model: nn.Module, selection: Selection, examined: Examined) -> FullLoraConfig:
        """LoRA without a target, and the modules as PEFT's modules_to_save; with the record. Raises: ConfigError."""
        base = base_of(model)
        wanted, chosen = self.wanted(base), set(selection.targets)
        wholes = wholes_of(base, examined.layers, wanted, [t for t in examined.targets if t.name in chosen])
        shared = {n: copy.deepcopy(getattr(self, n)) for n in ("task_type", "base_model_name_or_path", "revision")}
        stock = FullLoraConfig(
            target_modules=DUMMY_TARGET_MODULES,
            modules_to_save=[w.name for w in wholes],
            inference_mode=self.inference_mode,
            **shared,
        )
        always = always_modules(base, wanted)
        born = new_modules(base) if self.train_new else ()
        record = LiveRecord(
            config=plain_config(self),
            method=self.method,
            selection=selection,
            new_tensors=tuple(n for n in born if n in always),
        )
        stock._layerpeft = record  # type: ignore[attr-defined]
        stock._layerpeft_full = copy.copy(self)  # type: ignore[attr-defined]
        stock._layerpeft_wholes = wholes  # type: ignore[attr-defined]
        return stock


@dataclass
class FullLoraConfig(RecordedLoraConfig):
    """What PEFT sees of weights that train themselves: no LoRA, and whole modules; its folder holds those that were ever active."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's file, which names the modules whose weights are there, and the record."""
        model = getattr(self, "_layerpeft_model", lambda: None)()
        if model is None or not manifest.has_weights(save_directory):
            super().save_pretrained(save_directory, **kwargs)
            return
        names = saved_modules(model, getattr(self, "_layerpeft_adapter", "default"))
        twin = self.with_record(modules_to_save=names)
        RecordedLoraConfig.save_pretrained(twin, save_directory, **kwargs)


def place_all(model: nn.Module, live: Any, adapter: str) -> None:
    """Puts the wrappers into a model that PEFT is about to wrap by this config."""
    place(base_of(model), live._layerpeft_wholes, adapter)


def opened(model: nn.Module, live: Any, adapter: str) -> None:
    """After PEFT has frozen everything: lets gradients into what is to train, and says what always-on modules cost."""
    open_all(model, adapter)
    always = [w for w in live._layerpeft_wholes if w.layer is None and w.owner is None]
    asked = {w.name for w in always} - set(live._layerpeft.new_tensors)
    if not asked:
        return
    trained = [p for w in wrappers(model, adapter) if w._layerpeft_full.whole.name in asked for p in w.parameters()]
    count = sum(p.numel() for p in trained)
    held = sum(p.numel() * p.element_size() for p in trained)
    try:
        stop = backward.where(model, live._layerpeft.selection.stack if live._layerpeft.selection else None)
        below = f"; the backward pass runs to the bottom ({stop.why})" if stop.bottom else ""
    except LayerMapError:
        below = ""
    note(
        f"trained besides, whatever is chosen: {', '.join(w.name for w in always if w.name in asked)}: {count:,} weights, "
        f"{size_text(held)} of gradients, {size_text(2 * held)} of AdamW's states, {size_text(held)} of originals on the CPU{below}"
    )
