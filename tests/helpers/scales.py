"""A method from a file of its own: scales of what chosen linears give out (IA3, arXiv 2205.05638)."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import IA3Config
from peft.tuners.ia3 import IA3Layer

from layerpeft.errors import Problems
from layerpeft.integrations.peft import adapter_parameters
from layerpeft.model.layers import Target
from layerpeft.model.names import clean
from layerpeft.training.method import Method, Tensors
from layerpeft.tuners.config import LayerLoraConfig, options_given
from layerpeft.tuners.stock import Recorded

SHARED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save",
}  # fmt: skip


class Kind(str, enum.Enum):  # noqa: UP042 - PEFT compares its types as (str, Enum) members
    LAYER_SCALE = "LAYER_SCALE"


class ScaleMethod(Method):
    """Trains a number for each output."""

    def layers(self) -> dict[str, Any]:
        found = {n: m for n, m in self.model.named_modules() if isinstance(m, IA3Layer)}
        return {n: m for n, m in found.items() if self.adapter in m.ia3_l}

    def tensors(self) -> Tensors:
        return {clean(n): adapter_parameters(m, self.adapter) for n, m in self.layers().items()}

    def keep_only(self, targets: Set[str]) -> None:
        for name, layer in self.layers().items():
            if clean(name) not in targets:
                self.model.set_submodule(name, layer.get_base_layer())
        self.config.target_modules = set(targets)

    def found(self, state: Mapping[str, Any], prefix: str) -> set[str]:
        keys = {k.removeprefix(prefix).removesuffix(f".{self.adapter}") for k in state if k.startswith(prefix)}
        return {clean(k.removesuffix(".ia3_l")) for k in keys if k.endswith(".ia3_l")}


@dataclass
class RecordedIA3Config(Recorded, IA3Config):
    """What PEFT sees."""


@dataclass
class LayerScaleConfig(LayerLoraConfig):
    """Scales on chosen layers."""

    kind: ClassVar[enum.Enum] = Kind.LAYER_SCALE
    method: ClassVar[str] = "scale"
    works_by: ClassVar[type[Method]] = ScaleMethod
    seen_as: ClassVar[type[Recorded]] = RecordedIA3Config

    def refuse(self, problems: Problems) -> None:
        for name in options_given(self, SHARED):
            problems.add(f"{name}={getattr(self, name)!r}: LoRA's own", name)

    def stock(self, given: dict[str, Any], targets: Iterable[Target]) -> Recorded:
        return self.seen_as(feedforward_modules=[], **{n: given[n] for n in SHARED - {"peft_type"}})
