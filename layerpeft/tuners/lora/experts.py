"""LoRA on single experts, where all experts of a layer are one 3-D tensor (experts, out, in).

PEFT keeps the factors of all experts as two tensors. Here each picked expert has two of its own, A (r, in) and B (out, r), and the
others none; the branch is computed on the very rows that go through the expert (model.experts). What is saved is PEFT's own: the
rows of the others are zero.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.functional import linear

from layerpeft.errors import ConfigError
from layerpeft.integrations.peft import lora_layers, stores_out_first
from layerpeft.integrations.torch import eager
from layerpeft.model.experts import SINGLE, UNSEEN, Use, Uses, flat, rows_among
from layerpeft.model.names import clean
from layerpeft.model.stacked import name_of
from layerpeft.model.weights import in_pieces
from layerpeft.tuners.unreached import with_zeros

GROUP = "lora_experts"  # where a module keeps them, by adapter; PEFT knows names that begin so as an adapter's
Pair = tuple[nn.Parameter, nn.Parameter]  # A (r, in), B (out, r)


class Factors(nn.Module):
    """Those of one adapter in one tensor, by expert. `resting`: experts that do not train now."""

    def __init__(self) -> None:
        super().__init__()
        self.resting = frozenset[int]()

    def add(self, expert: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Copies of these, as an expert's factors."""
        for letter, factor in (("A", a), ("B", b)):
            self.register_parameter(
                f"{letter}_{expert}", nn.Parameter(factor.detach().clone(memory_format=torch.contiguous_format))
            )

    def items(self) -> Iterator[tuple[int, Pair]]:
        """Expert by expert."""
        for name, a in self._parameters.items():
            if name.startswith("A_") and a is not None:
                b = self._parameters[f"B{name[1:]}"]
                assert b is not None
                yield int(name[2:]), (a, b)

    def rest(self) -> None:
        """Freezes those that do."""
        for parameter in (p for e, pair in self.items() if e in self.resting for p in pair):
            parameter.requires_grad_(False)


class SingleExperts(ParamWrapper):
    """A weight of experts, of which some train by factors of their own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The experts' output, with the branch inside. Raises: ConfigError for a use of the weight that is not known."""
        mine = [a for a in self.active_adapters if a in factors_of(self)]
        others = [a for a in self.active_adapters if a not in mine and a in self.lora_A]
        if self.disable_adapters or self.merged or not mine:
            return ParamWrapper.forward(self, x, *args, **kwargs)
        if others or len(mine) > 1:
            name = [*mine[1:], *others][0]
            raise ConfigError(
                f"{self.parameter_name}: single experts train in {mine[0]!r}, beside which {name!r} cannot be active"
            )
        return _with_branch(self, mine[0], x, *args, **kwargs)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What an adapter adds to the whole tensor, as it is stored; zero for other experts."""
        if adapter_name not in factors_of(self):
            return super().get_delta_weight(adapter_name, *args, **kwargs)
        delta = torch.zeros_like(self.get_param())
        for expert, (a, b) in factors_of(self)[adapter_name].items():
            found = (b @ a) * self.scaling[adapter_name]
            delta[expert] = (found if stores_out_first(self) else found.T).to(delta)
        return delta

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """As PEFT begins: A random, B zero."""
        if adapter_name not in factors_of(self):
            super().reset_lora_parameters(adapter_name, init_lora_weights)
        elif init_lora_weights is not False:
            for _, (a, b) in factors_of(self)[adapter_name].items():
                nn.init.kaiming_uniform_(a, a=5**0.5)
                nn.init.zeros_(b)

    def _freeze_non_trainable_peft_weights(self, *args: Any, **kwargs: Any) -> None:
        """After PEFT has let gradients into all of an adapter, as when it is switched on again."""
        super()._freeze_non_trainable_peft_weights(*args, **kwargs)
        for factors in factors_of(self).values():
            factors.rest()


class _Branch(Uses):
    """Adds `s·B·A` of the picked experts to what their uses of the tensor give."""

    def __init__(self, layer: Any, adapter: str) -> None:
        super().__init__(layer.parameter_name, layer.get_param(), stores_out_first(layer), who=SINGLE)
        self.pairs, self.scale = dict(factors_of(layer)[adapter].items()), layer.scaling[adapter]
        self.number, self.reached = len(layer.get_param()), set[int]()

    def used(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The base's output and the branch."""
        y = compute()
        found = rows_among(use, self.pairs, self.number)
        if not found:
            return y
        self.reached |= {e for e, _ in found}
        out, x = flat(use, y)
        parts = [self._low(x if rows is None else x[rows], e).to(y.dtype) for e, rows in found]
        if found[0][1] is None:
            return y + parts[0].view_as(y)
        numbers = torch.arange(len(out), device=out.device)
        return out.index_add(0, torch.cat([numbers[rows] for _, rows in found]), torch.cat(parts)).view_as(y)

    def _low(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        a, b = self.pairs[expert]
        return linear(linear(x.to(a.dtype), a), b) * self.scale

    def unreached(self) -> list[nn.Parameter]:
        """What trains of experts that no token came to."""
        return [p for e, pair in self.pairs.items() if e not in self.reached for p in pair if p.requires_grad]


@eager
def _with_branch(layer: Any, adapter: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    uses = _Branch(layer, adapter)
    with uses:
        y = layer.base_layer(x, *args, **kwargs)
    if not uses.count and x.numel():
        raise uses.unknown(UNSEEN)
    return with_zeros(y, uses.unreached() if torch.is_grad_enabled() else [])


def factors_of(layer: Any) -> Any:
    """The factors of single experts in a module, by adapter."""
    return getattr(layer, GROUP, {})


def factors_in(layer: Any, adapter: str) -> Factors | None:
    """Those of one adapter, where it has some."""
    return dict(factors_of(layer).items()).get(adapter)


def single_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The modules with factors of single experts of this adapter, by their names in the model as it is."""
    return {n: m for n, m in model.named_modules() if adapter in factors_of(m)}


def tensor_of(name: str, layer: Any) -> str:
    """What the wrapped tensor is called in the unwrapped model."""
    return f"{clean(name)}.{layer.parameter_name}"


def place(model: nn.Module, adapter: str, picked: Mapping[str, Iterable[int]], trains: bool = True) -> None:
    """Turns an adapter's factors of all experts, of the tensors in `picked`, into those of the picked experts alone."""
    held: Mapping[str, Any] = {n: m for n, m in lora_layers(model, adapter).items() if isinstance(m, ParamWrapper)}
    for name, layer in held.items():
        experts = picked.get(tensor_of(name, layer))
        if experts is None:
            continue
        if not hasattr(layer, GROUP):
            setattr(layer, GROUP, nn.ModuleDict())
            layer.adapter_layer_names = (*layer.adapter_layer_names, GROUP)
        layer.__class__ = SingleExperts
        a, b = (getattr(layer, f"lora_{factor}")[adapter] for factor in "AB")
        factors, number = Factors(), len(layer.get_param())
        for expert in experts:
            factors.add(expert, *_own(a.weight, b.weight, expert, number))
        a.weight, b.weight = (
            nn.Parameter(t, requires_grad=False) for t in (a.weight.data[:0].clone(), b.weight.data[:, :0].clone())
        )
        factors.requires_grad_(trains)
        factors_of(layer)[adapter] = factors
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: ("lora_A", "lora_B")}


def _own(a: torch.Tensor, b: torch.Tensor, expert: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's factors among those of all, as PEFT lays them out: A one below the other, B with the experts innermost."""
    rank = a.shape[0] // number
    return a[expert * rank : (expert + 1) * rank], b.reshape(b.shape[0], rank, number)[:, :, expert]


def as_stock(model: nn.Module, config: Any, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """For PEFT's own ways to read an adapter: factors of all experts, zero where none train."""
    stock: dict[str, Any] = {}
    for name, layer in single_layers(model, adapter).items():
        number, held = layer.num_experts, list(factors_of(layer)[adapter].items())
        (a, b), rank = held[0][1], held[0][1][0].shape[0]
        all_a, all_b = a.new_zeros(number, rank, a.shape[1]), b.new_zeros(b.shape[0], rank, number)
        with torch.no_grad():
            for expert, (own_a, own_b) in held:
                inside = f"{name}.{GROUP}.{adapter}."
                all_a[expert] = found.get(f"{inside}A_{expert}", own_a)
                all_b[:, :, expert] = found.get(f"{inside}B_{expert}", own_b)
        stock[f"{name}.lora_A.{adapter}.weight"] = all_a.flatten(0, 1)
        stock[f"{name}.lora_B.{adapter}.weight"] = all_b.flatten(1)
    return stock | {k: None for k in found if f".{GROUP}." in k}


def found_in(model: nn.Module, adapter: str, state: Mapping[str, Any], prefix: str) -> set[str]:
    """The single experts of which a state dict, PEFT's or the model's own, holds factors: others have rows of zero."""
    found: set[str] = set()
    for name, layer in single_layers(model, adapter).items():
        inside = f"{prefix}{name}.{GROUP}.{adapter}.A_"
        own = [int(k.removeprefix(inside)) for k in state if k.startswith(inside)]
        whole = state.get(f"{prefix}{name}.lora_A.{adapter}.weight")
        if not own and whole is not None and whole.numel():
            rows = whole.reshape(layer.num_experts, -1)
            own = rows.any(1).nonzero().flatten().tolist()
        found |= {name_of(tensor_of(name, layer), e) for e in own}
    return found


def take(model: nn.Module, adapter: str, state: Any, prefix: str) -> None:
    """Puts the factors of single experts in the place of those of all, in a state dict that is being loaded."""
    for name, layer in single_layers(model, adapter).items():
        keys = [f"{prefix}{name}.lora_{factor}.{adapter}.weight" for factor in "AB"]
        if not all(k in state and state[k].numel() for k in keys):
            continue
        a, b = (state[k] for k in keys)
        for expert, _ in factors_of(layer)[adapter].items():
            for letter, own in zip("AB", _own(a, b, expert, layer.num_experts), strict=True):
                state[f"{prefix}{name}.{GROUP}.{adapter}.{letter}_{expert}"] = own
        state[keys[0]], state[keys[1]] = a[:0], b[:, :0]


class One(nn.Module):
    """One expert's matrix, as a report asks for it: how far it has changed."""

    def __init__(self, layer: Any, adapter: str, expert: int, pair: Pair) -> None:
        super().__init__()
        self.a, self.b, self._of = *pair, (layer, adapter, expert)  # in a tuple, since it is no part of this one

    @torch.no_grad()
    def trained_change(self) -> tuple[float, float]:
        """(‖s·B·A‖², ‖W‖²)."""
        layer, adapter, expert = self._of
        a, b = self.a.float(), self.b.float()
        change = float(((b.T @ b) * (a @ a.T)).sum()) * layer.scaling[adapter] ** 2
        return change, sum(float(piece.square_().sum()) for piece in in_pieces(layer.get_param()[expert]))


def reported(model: nn.Module, adapter: str) -> dict[str, nn.Module]:
    """Every single expert's matrix."""
    found: dict[str, nn.Module] = {}
    for name, layer in single_layers(model, adapter).items():
        stack, held = tensor_of(name, layer), factors_of(layer)[adapter].items()
        found |= {name_of(stack, e): One(layer, adapter, e, pair) for e, pair in held}
    return found
