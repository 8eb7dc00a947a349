"""Norms, and scales and biases of linears, in chosen layers (LLaMA-Adapter V2): its config, and what PEFT sees of it."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn

from layerpeft.errors import ConfigError, Problem, Problems
from layerpeft.integrations.peft import BASE_BIAS, LayerPeftType, lora_layers
from layerpeft.model.biases import biased, no_place
from layerpeft.model.layers import LayerMap, Target, base_of, find_module
from layerpeft.model.names import adapted, clean
from layerpeft.model.targets import MODULE
from layerpeft.saving.manifest import has_weights, keys_in
from layerpeft.selection.examined import Examined
from layerpeft.selection.select import Selection
from layerpeft.selection.typecheck import checked
from layerpeft.training.method import Method
from layerpeft.training.record import record_of
from layerpeft.tuners.config import LayerLoraConfig, options_given
from layerpeft.tuners.full.targets import Wanted, always_modules, refuse_namesakes
from layerpeft.tuners.stock import Recorded, RecordedLoraConfig, lora_fields, stock_config
from layerpeft.tuners.unlock import layer
from layerpeft.tuners.unlock.method import UnlockMethod, saved_in, stock_options

# LoRA's options that mean the same here; every other one is refused unless it is left alone
SHARED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "ensure_weight_tying",
}  # fmt: skip
FIXED = {"r": 1, "lora_alpha": 1}  # what the saved folder is as LoRA
KINDS = ("linear", "conv1d")


@dataclass
class UnlockedLoraConfig(RecordedLoraConfig):
    """What PEFT sees while it trains; its folder is a stock adapter, DoRA with biases."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As of any recorded one; of a pickled copy, which has no record, by the weights that are there."""
        if record_of(self) is None and has_weights(save_directory):
            shifted = any(key.endswith(BASE_BIAS) for key in keys_in(save_directory))
            stock = LoraConfig(**lora_fields(self) | stock_options(shifted))
            stock.save_pretrained(save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, **kwargs)


@dataclass
class LayerUnlockConfig(LayerLoraConfig):
    """Unlocks chosen layers: their norms train, and every linear y = W x + b₀ becomes s ⊙ (W x + b₀ + b), s and b (out,), 1 and 0
    at the start (LLaMA-Adapter V2, arXiv 2304.15010). No weight matrix trains.

    `target_modules`: the linears, all of a layer unless it says otherwise. `biases`: False learns scales alone; `norms`: False
    leaves norms frozen. A bias is learned where the linear has one, or the model's config has a place for it (`attention_bias`,
    `mlp_bias`), so that weights and biases can hold the result. `modules_to_save`: what trains whole besides (the last norm).
    LoRA's other options have no meaning here. Raises: ConfigError naming every problem at once.
    """

    r: int = checked(1, "Of the saved adapter, always 1.")
    lora_alpha: int = checked(1, "Of the saved adapter, always 1.")
    target_modules: Any = checked("all-linear", "The linears that get a scale and a bias. Default: all of a layer.")
    biases: bool = checked(True, "Learn biases, too.")
    norms: bool = checked(True, "Train the norms of chosen layers.")
    kind: ClassVar[enum.Enum] = LayerPeftType.LAYER_UNLOCK
    method: ClassVar[str] = "unlock"
    works_by: ClassVar[type[Method]] = UnlockMethod
    seen_as: ClassVar[type[Recorded]] = UnlockedLoraConfig
    units: ClassVar[tuple[str, ...]] = ("layer", "sublayer", "target", "expert")

    def refuse(self, problems: Problems) -> None:
        """Adds LoRA's own options."""
        given = [n for n in options_given(self, SHARED) if n not in FIXED]
        for name in given + [n for n, value in FIXED.items() if getattr(self, n) != value]:
            problems.add(
                f"{name}={getattr(self, name)!r}: LoRA's own, without a meaning for scales and biases of linears", name
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without LoRA's own options."""
        left_out = {f.name for f in fields(LoraConfig)} - SHARED
        return {k: v for k, v in super().to_dict().items() if k not in left_out}

    def resolve(self, model: nn.Module, batches: Iterable[Any] | None = None, *, progress: bool = True) -> LoraConfig:
        """Never: a stock config would train factors. Raises: ConfigError."""
        raise ConfigError(
            "scales and biases of linears have no stock config that trains the same: give the config itself to get_peft_model or "
            "to a trainer's peft_config="
        )

    def targets_in(self, model: nn.Module, layers: LayerMap) -> tuple[Target, ...]:
        """The linears of these layers, and their norms.

        Raises: SelectionError; ConfigError for what is no linear, and for biases that no plain model could hold.
        """
        linears = super().targets_in(model, layers)
        unfit = [t for t in linears if t.kind not in KINDS]
        if unfit:
            more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
            sentence = f"{unfit[0].name} ({unfit[0].kind}){more}: scales and biases are for linears"
            raise ConfigError(Problem(("target_modules",), f"target_modules: {sentence}"))
        if self.biases:
            _refuse_biases(base_of(model), linears)
        return (*linears, *norms_in(model, layers)) if self.norms else linears

    def stock_for(self, model: nn.Module, selection: Selection, examined: Examined) -> Recorded:
        """LoRA of rank 1 on the chosen linears, the chosen norms as modules to save, with the record. Raises: ConfigError."""
        base = base_of(model)
        held = {t.name for t in examined.targets if t.kind != MODULE}
        linears, chosen = [t for t in examined.targets if t.name in held], selection.targets
        norms = [n for n in chosen if n not in held]
        there = {adapted(n): n for n, _ in base.named_modules()}
        refuse_namesakes(list(there), set(norms))
        stock: Any = stock_config(
            self, model, replace(selection, targets=tuple(n for n in chosen if n in held)), linears
        )
        always = always_modules(base, Wanted(always=tuple(stock.modules_to_save or ())))
        stock.modules_to_save = [there.get(n, n) for n in (*always, *norms)] or None
        stock._layerpeft.selection = selection
        return stock

    @classmethod
    def loaded(cls, model: nn.Module, adapter: str, live: Any, trains: bool, folder: Path) -> Method:
        """The scales and biases that lie in the folder, in the place of what they come to, which PEFT has read."""
        saved = saved_in(folder)
        live.use_dora, live.bias = False, "none"
        for name, module in lora_layers(model, adapter).items():
            own = layer.place(module, adapter, f"{clean(name)}.shift" in saved, inference=not trains)
            for part, parameter in own.named_parameters():
                parameter.data.copy_(saved[f"{clean(name)}.{part}"])
            if (bias := getattr(module.get_base_layer(), "bias", None)) is not None:
                bias.requires_grad_(False)
        selection = live._layerpeft.selection
        layer.adopt(model, adapter, selection.targets if selection is not None else ())
        for name, norm in layer.norms(model, adapter, always=True).items():
            for part, parameter in layer.trained(norm, adapter).items():
                parameter.data.copy_(saved[f"{clean(name)}.{part}"])
        method = UnlockMethod(model, adapter, live)
        method.watch()
        return method


def norms_in(model: nn.Module, layers: LayerMap) -> tuple[Target, ...]:
    """The norms of these layers."""
    found: list[Target] = []
    seen: set[int] = set()
    for block in layers.layers:
        for inner, module in find_module(model, block.name).named_modules():
            held = {id(p): p.numel() for p in module.parameters()}
            if layer.is_norm(module) and not seen & held.keys():
                seen |= held.keys()
                size = sum(held.values())
                found.append(Target(f"{block.name}.{clean(inner)}", block.index, "norm", MODULE, (), size))
    return tuple(found)


def _refuse_biases(base: nn.Module, linears: Iterable[Target]) -> None:
    """Raises: ConfigError for linears without a bias, of which the model's config has no place for one."""
    bare = [t.name for t in linears if getattr(find_module(base, t.name), "bias", None) is None]
    if not bare or biased(base, bare) is not None:
        return
    one = {n.rpartition(".")[2]: n for n in bare}
    ends = sorted(end for end, name in one.items() if biased(base, [name]) is None) or sorted(one)
    lost = [n for n in bare if n.rpartition(".")[2] in ends]
    sentence = (
        f"learned for {no_place(base, lost)}. Learn scales alone (biases: false), or leave these linears out (exclude_modules: "
        f"[{', '.join(ends)}])"
    )
    raise ConfigError(Problem(("biases",), f"biases: {sentence}"))
