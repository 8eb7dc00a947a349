"""What share of a layer's routing goes to each expert (ESFT, arXiv 2407.01906): the experts that the task itself uses.

`statistic: tokens` is ESFT-Token, `n_e / Σ n` with `n_e` the tokens that went through expert e (each token counts once for every
expert that it goes to). `gates` is ESFT-Gate, `Σ_t g_et / Σ_t Σ_e g_et` with `g` the router's softmax over all experts, of those
that the token goes to; where the experts of a layer are 3-D tensors, what the model weighs their outputs by. Tokens of all batches
are pooled, and the shares of the routed experts of a layer make up 1, so that `split: cumulative` with `within: layer` is the
paper's rule. (Its published script divides by sums over the layers instead.) Costs one forward pass over every batch.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.errors import NothingSeenError, ScoreError
from layerpeft.integrations.torch import eager
from layerpeft.model.architectures import text_config
from layerpeft.model.layers import Target, find_module
from layerpeft.model.stacked import EXPERT, holder, place_of
from layerpeft.model.units import expert_number
from layerpeft.selection.probe import Key, attach_taps
from layerpeft.selection.scorers import Traits
from layerpeft.selection.scoring import Measured, Request, Watching

TRAITS = Traits(units=("expert",), reason="it counts the tokens that go to experts")


@dataclass(frozen=True)
class Options:
    """`statistic`: how many tokens an expert gets, or what the gates give it."""

    statistic: Literal["tokens", "gates"] = "tokens"


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


class Routing(Watching):
    """The running measurement: tokens by expert, and gates by expert where those are asked for."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        first: dict[int, Target] = {}
        for target in request.targets:
            first.setdefault(target.layer, target)
        self._ways = {
            unit: t for unit, t in first.items() if t.kind != EXPERT
        }  # by which a token enters an expert, by unit
        self._unit_of = {t.name: unit for unit, t in self._ways.items()}
        self._stacks: dict[str, dict[int, int]] = {}  # of a module that holds all experts: expert -> unit
        for unit, target in first.items():
            if unit not in self._ways:
                self._stacks.setdefault(holder(target.name), {})[place_of(target.name)[1]] = unit
        self._routers = _routers(request, self._ways.values()) if options.statistic == "gates" else {}
        self._now = dict.fromkeys(first, 0.0)  # tokens of the running batch
        self._logits: dict[int, list[torch.Tensor]] = {}  # of the running batch, by layer
        self._sums = dict.fromkeys(first, 0.0)

    def attach(self) -> None:
        """Puts the hooks on."""
        self._handles = attach_taps(self.request.model, self._ways.values(), self._tap)
        for name, units in self._stacks.items():
            hook = eager(partial(self._enter, name, units))
            self._handles.append(
                find_module(self.request.model, name).register_forward_pre_hook(hook, with_kwargs=True)
            )
        for layer, name in self._routers.items():
            hook = eager(lambda _module, _args, y, layer=layer: self._see(layer, y))
            self._handles.append(find_module(self.request.model, name).register_forward_hook(hook, prepend=True))

    def next_batch(self, scale: float | None = None) -> None:
        """Adds up the batch that came through."""
        if self._routers:
            self._add_gates()
        for unit in (u for u in self._sums if not (self._routers and u in self._ways)):
            self._sums[unit] += self._now[unit]
        self._now = dict.fromkeys(self._now, 0.0)
        self._logits.clear()
        super().next_batch(scale)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums over processes, in the order of the experts."""
        found = add(torch.tensor(list(self._sums.values()), dtype=torch.float64)).tolist()
        self._sums = dict(zip(self._sums, found, strict=True))

    def result(self) -> Measured:
        """Shares by expert, of the routed experts of its layer. Raises: ScoreError where a layer routed nothing."""
        layers = self.request.layers
        whole: dict[int, float] = {}
        for unit, n in self._sums.items():
            block = layers.block(unit).index
            whole[block] = whole.get(block, 0.0) + n
        if not any(whole.values()):
            raise NothingSeenError("no token went through any of these experts")
        idle = [layers.whole.names[block] for block, n in whole.items() if not n]
        if idle:
            raise ScoreError(f"no token went through the experts of {', '.join(idle)}; leave those layers out")
        shares = {unit: n / whole[layers.block(unit).index] for unit, n in self._sums.items()}
        return Measured(tuple(shares.get(i, 0.0) for i in range(len(layers))))

    def _tap(self, y: torch.Tensor, x: torch.Tensor, keys: Mapping[Key, Any]) -> torch.Tensor:
        self._running = True
        for name, _ in keys:
            self._now[self._unit_of[name]] += x.numel() // x.shape[-1]
        return y

    def _enter(self, name: str, units: Mapping[int, int], module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a module that holds all experts of a layer. Raises: ScoreError where it is not told which a token goes to."""
        self._running = True
        try:
            _, which, gates, *_ = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
            gates = gates if gates.shape == which.shape else gates.gather(-1, which)
            weights = gates.detach().flatten().double().cpu() if self.options.statistic == "gates" else None
            found = torch.bincount(which.detach().flatten().cpu(), weights, max(units) + 1).tolist()
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ScoreError(
                f"{name}: {type(module).__name__} is not called with hidden states, the experts of each token and their weights, "
                "so that what goes to which expert cannot be counted"
            ) from error
        for expert, unit in units.items():
            self._now[unit] += found[expert]

    def _see(self, layer: int, y: torch.Tensor) -> None:
        self._logits.setdefault(layer, []).append(y.detach().float().flatten(0, -2))

    def _add_gates(self) -> None:
        for layer, seen in self._logits.items():
            gates = torch.cat(seen).softmax(-1)
            units = [i for i in self._sums if self.request.layers.block(i).index == layer]
            each = max(1, round(sum(self._now[i] for i in units) / max(1, len(gates))))  # experts of a token
            best = gates.topk(min(each, gates.shape[-1]), -1)
            sums = torch.zeros(gates.shape[-1], dtype=torch.float64)
            sums.index_add_(0, best.indices.flatten().cpu(), best.values.flatten().double().cpu())
            for i in units:
                self._sums[i] += float(sums[expert_number(self.request.layers.names[i])])


start = Routing


def _routers(request: Request, targets: Iterable[Target]) -> dict[int, str]:
    """The router of every layer that holds these experts. Raises: ScoreError where gates are no softmax over a linear's output."""
    how = getattr(text_config(request.model), "scoring_func", "softmax")
    found: dict[int, str] = {}
    for block in {request.layers.block(t.layer).index for t in targets}:
        layer = request.layers.whole.layers[block]
        routers = [t.name for t in layer.targets if t.role == "moe.router"]
        if how != "softmax" or len(routers) != 1 or not isinstance(find_module(request.model, routers[0]), nn.Linear):
            raise ScoreError(
                f"statistic: gates: what routes the tokens of {layer.name} is no softmax over one linear's output, which could be "
                "watched; use statistic: tokens"
            )
        found[block] = routers[0]
    return found
