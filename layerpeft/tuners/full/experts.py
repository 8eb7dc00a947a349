"""Single experts that train in place, where all experts of a layer are one 3-D tensor (experts, out, in).

What trains is a Parameter for each picked expert, a view of its place in the tensor: an optimizer updates it there, and holds
nothing for the others. The tensor itself is frozen and computes as ever. What the model does with it is followed (model.experts),
and the backward pass makes the gradients of the picked experts alone, from the rows that went through them.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from layerpeft.integrations.peft import is_traced
from layerpeft.integrations.torch import Inside, eager
from layerpeft.model.experts import SINGLE, UNSEEN, Use, Uses, flat, rows_among
from layerpeft.tuners.unreached import with_zeros

Place = tuple[str, int]  # a tensor of the module, and the expert


class Picked(Inside):
    """The parameters of the picked experts of one module. State dicts know nothing of them: the module's own tensors hold them."""

    def __init__(self, module: nn.Module, names: Iterable[str], experts: Iterable[int]) -> None:
        super().__init__()
        self._of = (module,)  # in a tuple, since it is no part of this one
        self.places: dict[str, Place] = {f"{name}_{e}": (name, e) for e in experts for name in names}
        for key, place in self.places.items():
            self.register_parameter(key, nn.Parameter(self._there(place)))

    def items(self) -> Iterator[tuple[Place, nn.Parameter]]:
        """Expert by expert."""
        for key, place in self.places.items():
            parameter = self._parameters[key]
            assert parameter is not None
            yield place, parameter

    def drop(self, experts: Iterable[int]) -> None:
        """These are picked no more; their weights stay as they are."""
        gone = set(experts)
        for key in [k for k, (_, e) in self.places.items() if e in gone]:
            delattr(self, key)
            del self.places[key]

    def tie(self, follow: bool = False) -> None:
        """Sees to it that the parameters are views still, which copies and moves end; `follow`: what the tensor holds counts."""
        for place, parameter in self.items():
            there = self._there(place)
            same = (
                parameter.shape == there.shape and parameter.dtype == there.dtype and parameter.device == there.device
            )
            if is_traced(there) or (same and parameter.data_ptr() == there.data_ptr()) or not (same or follow):
                continue
            if not follow:
                there.copy_(parameter.data)
            parameter.data = there

    def others(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What of the tensors is not picked, as views of runs of experts, by name."""
        for name in dict.fromkeys(name for name, _ in self.places.values()):
            tensor = self._of[0].get_parameter(name).data
            start = 0
            for end in [*sorted(e for n, e in self.places.values() if n == name), len(tensor)]:
                if end > start:
                    yield f"{name}[{start}:{end}]", tensor[start:end]
                start = end + 1

    def _there(self, place: Place) -> torch.Tensor:
        return self._of[0].get_parameter(place[0]).data[place[1]]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The module has been moved or cast just before; views follow it."""
        self.tie(follow=True)
        for _, parameter in self.items():
            if parameter.grad is not None:
                parameter.grad = fn(parameter.grad)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.tie()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.tie(follow=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Picked":
        twin = memo[id(self)] = Picked(copy.deepcopy(self._of[0], memo), (), ())
        twin.places = dict(self.places)
        for key, place in self.places.items():
            mine = self._parameters[key]
            assert mine is not None
            memo[id(mine)] = parameter = nn.Parameter(twin._there(place), mine.requires_grad)
            parameter.grad = copy.deepcopy(mine.grad, memo)
            twin.register_parameter(key, parameter)
        return twin


@eager
def run(module: nn.Module, picked: Picked, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the module gives; in the backward pass the picked experts get their gradients, zeros those that no token reached."""
    picked.tie()
    training = {place: p for place, p in picked.items() if p.requires_grad}
    if not training or not torch.is_grad_enabled():
        return module(*args, **kwargs)
    by_name: dict[str, dict[int, nn.Parameter]] = {}
    for (name, expert), parameter in training.items():
        by_name.setdefault(name, {})[expert] = parameter
    stacks = {n: held for n, held in by_name.items() if module.get_parameter(n).dim() == 3}
    flat_ones = {n: _tied(module.get_parameter(n), held) for n, held in by_name.items() if n not in stacks}
    out_first = not getattr(module, "is_transposed", False)
    with ExitStack() as stack:
        uses = [_Gradients(n, module.get_parameter(n), out_first, held) for n, held in stacks.items()]
        for each in uses:
            stack.enter_context(each)
        y = functional_call(module, flat_ones, args, dict(kwargs)) if flat_ones else module(*args, **kwargs)
    unseen = next((each for each in uses if not each.count), None)
    if unseen is not None and args and args[0].numel():
        raise unseen.unknown(UNSEEN)
    idle = [p for each in uses for e, p in each.held.items() if e not in each.reached]
    return with_zeros(y, idle)


def _tied(tensor: torch.Tensor, held: Mapping[int, nn.Parameter]) -> torch.Tensor:
    return _Tied.apply(tensor.detach(), tuple(held), *held.values())  # type: ignore[return-value]


class _Gradients(Uses):
    """Collects the gradients of some experts from the uses of the tensor that they lie in."""

    def __init__(self, name: str, weight: torch.Tensor, out_first: bool, held: Mapping[int, nn.Parameter]) -> None:
        super().__init__(name, weight, out_first, who=SINGLE)
        self.held, self.number, self.reached = held, len(weight), set[int]()

    def used(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The output as it is."""
        y = compute()
        found = rows_among(use, self.held, self.number)
        if not found:
            return y
        self.reached |= {e for e, _ in found}
        out, x = flat(use, y)
        x = x.detach()
        own = [x if rows is None else x[rows] for _, rows in found]
        kept = own[0] if len(own) == 1 else torch.cat(own)
        places = [(rows, len(part)) for (_, rows), part in zip(found, own, strict=True)]
        tapped: Any = _Collect.apply(out, kept, places, self.out_first, *(self.held[e] for e, _ in found))
        return tapped.view_as(y)


class _Collect(torch.autograd.Function):
    """The identity on y; its backward gives `gyᵀ x` of the rows of each expert, as the tensor stores it."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, places: list[tuple[Any, int]], out_first: bool, *held: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.places, ctx.out_first, ctx.types = places, out_first, [p.dtype for p in held]
        return y.data  # not a view: the model may go on to change its output in place

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gy,), (x,), found, start = grads, ctx.saved_tensors, [], 0
        for (rows, count), kind in zip(ctx.places, ctx.types, strict=True):
            own, read = gy if rows is None else gy[rows], x[start : start + count].to(gy.dtype)
            found.append((own.T @ read if ctx.out_first else read.T @ own).to(kind))
            start += count
        return gy, None, None, None, *found


class _Tied(torch.autograd.Function):
    """The identity on a tensor (experts, …) without a gradient; its backward gives those of some experts."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, experts: tuple[int, ...], *held: torch.Tensor) -> torch.Tensor:
        ctx.experts = experts
        return tensor.data

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, None, *(grads[0][e] for e in ctx.experts)
