"""Experts of a layer that lie in one 3-D tensor (experts, out, in), each as a target of its own.

Expert 5 of `mlp.experts.gate_up_proj` is called `mlp.experts.5.gate_up_proj`, and all there is of it `mlp.experts.5`, like experts
that are modules of their own.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from layerpeft.model.layers import Target, find_module

EXPERT = "expert"  # the kind of a target that is one expert's matrix in such a tensor
_NAME = re.compile(r"(?P<owner>.*(?:^|\.)experts)\.(?P<number>\d+)(?P<rest>\.\w+)?")


def name_of(stack: str, expert: int, whole: bool = False) -> str:
    """What an expert in a tensor is called; `whole`: `stack` is the module that holds such tensors."""
    owner, _, leaf = stack.rpartition(".")
    return f"{stack}.{expert}" if whole else f"{owner}.{expert}.{leaf}"


def place_of(name: str) -> tuple[str, int]:
    """The tensor (of all there is of an expert: the module of tensors) that it lies in, and its number there."""
    found = _NAME.fullmatch(name)
    assert found is not None
    return found["owner"] + (found["rest"] or ""), int(found["number"])


def holder(name: str) -> str:
    """The module of tensors that a name is of, or lies in: of an expert the one around it, of anything else itself."""
    found = _NAME.fullmatch(name)
    return found["owner"] if found else name


def stack_of(name: str) -> str:
    """The tensor (or module of tensors) that a name is of an expert in, or would be; of anything else itself."""
    return place_of(name)[0] if _NAME.fullmatch(name) else name


def picked_in(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Tensor, or module of tensors -> the experts in it that these names mean; experts that are modules of their own are none."""
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match and match["number"] not in find_module(model, match["owner"])._modules:
            stack, expert = place_of(name)
            found[stack] = (*found.get(stack, ()), expert)
    return {stack: tuple(sorted(experts)) for stack, experts in found.items()}


def one_by_one(matrices: Iterable[Target], targets: Iterable[Target]) -> Iterator[Target]:
    """These targets, with those that hold all experts of a layer taken apart into one of each.

    `matrices`: those of the layer, by which modules that hold nothing but experts are known.
    """
    counts = {t.name.rpartition(".")[0]: t.shape[0] for t in matrices if _is_stack(t)}
    for target in targets:
        if _is_stack(target):
            number, *shape = target.shape
            one = replace(target, kind=EXPERT, shape=tuple(shape), params=target.params // number)
            yield from (replace(one, name=name_of(target.name, e)) for e in range(number))
        elif target.name in counts:
            number = counts[target.name]
            one = replace(target, params=target.params // number)
            yield from (replace(one, name=name_of(target.name, e, whole=True)) for e in range(number))
        else:
            yield target


def _is_stack(target: Target) -> bool:
    return target.kind == "experts" and target.name.rpartition(".")[0].endswith("experts")
