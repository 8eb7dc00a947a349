"""What a method that trains LoRA factors tells those who follow it: its tensors, target by target."""

from collections.abc import Mapping, Set
from typing import Any

from torch import nn

from layerpeft.integrations.peft import adapter_parameters, let_rest, lora_layers, unwrap_layer
from layerpeft.model.costs import Work
from layerpeft.model.names import clean
from layerpeft.training.method import Method, Tensors

LOWEST_RANK = 4


class LoraMethod(Method):
    """Trains factors beside the chosen weights."""

    @classmethod
    def ranks(cls, asked: int) -> tuple[int, ...]:
        """Halves, down to the lowest that is worth a try."""
        return (asked, *(asked >> i for i in range(1, asked.bit_length()) if asked >> i >= LOWEST_RANK))

    @classmethod
    def work(cls, config: Any) -> Work:
        return Work(config.r)

    def tensors(self) -> Tensors:
        """Target -> the adapter's tensors in it, with the bias that LoRA trains."""
        found: Tensors = {}
        for name, layer in lora_layers(self.model, self.adapter).items():
            own = getattr(layer.get_base_layer(), "bias", None) if self.config.bias == "lora_only" else None
            group = adapter_parameters(layer, self.adapter)
            found[_target(name, layer)] = group | ({"bias": own} if isinstance(own, nn.Parameter) else {})
        return found

    def wrapped(self) -> set[str]:
        """Modules, where targets can be parameters in them."""
        return set(map(clean, lora_layers(self.model, self.adapter)))

    def keep_only(self, targets: Set[str]) -> None:
        """The modules themselves come back."""
        for name in list(lora_layers(self.model, self.adapter)):
            if clean(name) not in targets:
                unwrap_layer(self.model, name, self.adapter)
        self.config.target_modules = set(targets)

    def switched(self, training: Set[str] | None, policy: str) -> None:
        """Lets modules rest that do not train, whatever PEFT switches off and on meanwhile."""
        for name, layer in lora_layers(self.model, self.adapter).items():
            let_rest(layer, self.adapter, training is not None and _target(name, layer) not in training)

    def found(self, state: Mapping[str, Any], prefix: str) -> set[str]:
        """By either factor, one of which may be frozen and left out; nothing where embeddings are there, which have other names."""
        # PEFT writes the adapter's name only into the keys of modules that it finds.
        plain, named = ([f".lora_{factor}.{name}weight" for factor in "AB"] for name in ("", f"{self.adapter}."))
        ends = plain + named
        if any(".lora_A." in k and not k.endswith(tuple(ends)) for k in state):
            ends = named
        keys = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
        if any(".lora_embedding" in k for k in keys):
            return set()
        return {clean(k.removesuffix(end)) for end in ends for k in keys if k.endswith(end)}


def _target(name: str, layer: Any) -> str:
    parameter = getattr(layer, "parameter_name", None)
    return f"{clean(name)}.{parameter}" if parameter else clean(name)
