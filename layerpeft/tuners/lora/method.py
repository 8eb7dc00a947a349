"""What a method that trains LoRA factors tells those who follow it: its tensors, target by target."""

from collections.abc import Iterable, Mapping, Set
from typing import Any, ClassVar

from torch import nn

from layerpeft.errors import ConfigError
from layerpeft.integrations.engines.engine import Need
from layerpeft.integrations.peft import adapter_parameters, let_rest, lora_layers, unwrap_layer, watch_states
from layerpeft.model.experts import SHARED_OUT
from layerpeft.model.layers import Target
from layerpeft.model.load import Work
from layerpeft.model.names import clean
from layerpeft.model.stacked import name_of, picked_in
from layerpeft.training.method import Method, Tensors
from layerpeft.tuners.lora import experts

LOWEST_RANK = 4


ONE_ONLY = (
    "a model has one adapter that trains single experts of a 3-D tensor: {name!r} cannot be a copy of it. Where a trainer wants a "
    "copy of what was trained before (DPO without a reference model), merge it first (layerpeft merge) and train a new adapter "
    "over that, or give the trainer a ref_model"
)


class LoraMethod(Method):
    """Trains factors beside the chosen weights."""

    single: ClassVar[Need | None] = "single_experts"

    @classmethod
    def ranks(cls, asked: int) -> tuple[int, ...]:
        """Halves, down to the lowest that is worth a try."""
        return (asked, *(asked >> i for i in range(1, asked.bit_length()) if asked >> i >= LOWEST_RANK))

    @classmethod
    def work(cls, config: Any) -> Work:
        return Work(config.r, dropout=config.lora_dropout)

    def tensors(self) -> Tensors:
        """Target -> the adapter's tensors in it, with the bias that LoRA trains."""
        found: Tensors = {}
        for name, layer in lora_layers(self.model, self.adapter).items():
            if factors := experts.factors_in(layer, self.adapter):
                stack = experts.tensor_of(name, layer)
                found |= {name_of(stack, e): {"lora_A": a, "lora_B": b} for e, (a, b) in factors.items()}
                continue
            own = getattr(layer.get_base_layer(), "bias", None) if self.config.bias == "lora_only" else None
            group = adapter_parameters(layer, self.adapter)
            found[_target(name, layer)] = group | ({"bias": own} if isinstance(own, nn.Parameter) else {})
        return found

    def wrapped(self) -> set[str]:
        """Modules, where targets can be parameters in them; single experts themselves."""
        held = lora_layers(self.model, self.adapter)
        plain = {clean(n) for n, layer in held.items() if self.adapter not in experts.factors_of(layer)}
        return plain | set(experts.reported(self.model, self.adapter))

    def wrap(self, targets: Iterable[Target]) -> None:
        """Of experts in 3-D tensors the picked ones alone get factors."""
        self.adopt(not self.config.inference_mode)

    def adopt(self, trains: bool) -> None:
        """What PEFT has made, or read, are factors of all experts."""
        selection = self.config._layerpeft.selection
        if selection is not None and selection.unit == "expert":
            experts.place(self.model, self.adapter, picked_in(self.model, selection.targets), trains)
            watch_states(experts.as_stock)

    def assumed(self) -> list[str]:
        """Of single experts how many rows go through them."""
        return [SHARED_OUT] if experts.single_layers(self.model, self.adapter) else []

    def modules(self) -> Mapping[str, nn.Module]:
        """Single experts."""
        return experts.reported(self.model, self.adapter)

    def keep_only(self, targets: Set[str]) -> None:
        """The modules themselves come back."""
        for name in list(lora_layers(self.model, self.adapter)):
            if clean(name) not in targets:
                unwrap_layer(self.model, name, self.adapter)
        self.config.target_modules = set(targets)

    def switched(self, training: Set[str] | None, policy: str) -> None:
        """Lets modules rest that do not train, whatever PEFT switches off and on meanwhile."""
        for name, layer in lora_layers(self.model, self.adapter).items():
            if factors := experts.factors_in(layer, self.adapter):
                names = ((e, name_of(experts.tensor_of(name, layer), e)) for e, _ in factors.items())
                factors.resting = frozenset(e for e, t in names if training is not None and t not in training)
                continue
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
        single = {clean(n) for n in experts.single_layers(self.model, self.adapter)}
        found = {clean(k.removesuffix(end)) for end in ends for k in keys if k.endswith(end)} - single
        return found | experts.found_in(self.model, self.adapter, state, prefix)

    def on_load(self, state: Mapping[str, Any], prefix: str, found: Set[str], folder: str | None) -> None:
        """Single experts take theirs out of the factors of all."""
        experts.take(self.model, self.adapter, state, prefix)

    def copied(self, adapter: str) -> None:
        """Raises: ConfigError for single experts, as PEFT would put factors of all in the place of a copy."""
        if experts.single_layers(self.model, self.adapter):
            raise ConfigError(ONE_ONLY.format(name=adapter))

    def swapped(self) -> None:
        """Raises: ConfigError for single experts, as PEFT swaps factors of all."""
        if experts.single_layers(self.model, self.adapter):
            raise ConfigError(
                f"hotswap_adapter exchanges factors of all experts, and {self.adapter!r} trains single ones: "
                "model.load_adapter(folder, adapter_name) on a model that is wrapped the same way takes another folder's"
            )


def _target(name: str, layer: Any) -> str:
    parameter = getattr(layer, "parameter_name", None)
    return f"{clean(name)}.{parameter}" if parameter else clean(name)
