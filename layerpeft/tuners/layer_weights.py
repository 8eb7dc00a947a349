"""A weight for each layer by which what was trained in it, or what sets two models apart, is added."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from layerpeft.errors import ConfigError, LayerpeftError, Problems, told
from layerpeft.integrations.files import read_text
from layerpeft.integrations.places import meant
from layerpeft.model.names import place_among
from layerpeft.model.weights import PIECE, widest
from layerpeft.selection.grammar import check_grammar, layer_numbers

OUTSIDE = "outside"  # what stands in the place of a layer for embeddings, the head, the last norm
EXAMPLE = "'0-7=0.5,8-11=1', 'last:4=0.3,outside=0', or a YAML or JSON file with a weight by layers"
WeightOf = Callable[[str], float]  # by the name of a tensor or module
Asked = Mapping[Any, Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class LayerWeights:
    """`by`: layers, in the layer grammar, with their weight; what is not named, `outside` of the layers too, counts 1."""

    by: tuple[tuple[Any, float], ...] = ()
    outside: float = 1.0

    @classmethod
    def parse(cls, asked: Asked) -> "LayerWeights":
        """Of a mapping `{"0-7": 0.5, "outside": 0}`, a text `0-7=0.5,outside=0`, or the name of a file that holds such a mapping.

        Layers may be written `layers.0-7`, too. Raises: ConfigError naming every problem.
        """
        problems = Problems(f"weights of layers; write {EXAMPLE}")
        found: list[tuple[Any, float]] = []
        outside = 1.0
        for layers, weight in _pairs(asked, problems):
            layers = layers.strip().removeprefix("layers.") if isinstance(layers, str) else layers
            number = _number(weight)
            if number is None:
                problems.add(f"{layers}: {weight!r} is no finite number", "weights")
            elif layers == OUTSIDE:
                outside = number
            else:
                check_grammar("weights", layers, problems)
                found.append((layers, number))
        problems.raise_if_any(ConfigError)
        return cls(tuple(found), outside)

    def placed(self, names: Sequence[str]) -> WeightOf:
        """The weight of what has a name, among layers of these names. Raises: ConfigError for layers that are not there, or come
        twice."""
        problems, weights = Problems(f"weights of layers; there are {len(names)}"), dict[int, float]()
        for layers, weight in self.by:
            try:
                numbers = layer_numbers(layers, len(names), "weights")
            except LayerpeftError as error:
                problems.absorb(error)
                continue
            if twice := sorted(set(numbers) & weights.keys()):
                problems.add(f"{layers}: layer {twice[0]} has a weight already", "weights")
            weights |= dict.fromkeys(numbers, weight)
        problems.raise_if_any(ConfigError)
        place = place_among(names)

        def weight_of(name: str) -> float:
            layer = place(name)
            return self.outside if layer is None else weights.get(layer, 1.0)

        return weight_of


def weighed(old: torch.Tensor, new: torch.Tensor, weight: float) -> torch.Tensor:
    """`old + weight · (new − old)`, in float64 and rounded once, to the type of `old`; `old` itself for 0."""
    return added(old, new, old, weight)


def added(old: torch.Tensor, plus: torch.Tensor, minus: torch.Tensor, weight: float) -> torch.Tensor:
    """`old + weight · (plus − minus)`, a piece at a time in float64 and rounded once, to the type of `old`; `old` itself for 0."""
    if not weight or not old.is_floating_point():
        return old
    kind, found = widest(old.device), torch.empty_like(old, memory_format=torch.contiguous_format)
    for out, *parts in zip(*(t.detach().reshape(-1).split(PIECE) for t in (found, old, plus, minus)), strict=True):
        mine, high, low = (t.to(old.device, kind) for t in parts)
        out.copy_(mine + weight * (high - low))
    return found


def _pairs(asked: Asked, problems: Problems) -> list[tuple[Any, Any]]:
    if isinstance(asked, Mapping):
        return list(asked.items())
    text = os.fspath(asked)
    if os.path.isfile(text):
        try:
            held = yaml.safe_load(read_text(text))
        except yaml.YAMLError as error:
            problems.add(f"{text} is neither YAML nor JSON: {told(error, 200)}", "weights")
            return []
        if not isinstance(held, dict):
            problems.add(f"{text} holds no weights by layers", "weights")
            return []
        return list(held.items())
    found, before = [], []
    for piece in text.split(","):  # which may also stand between layers of one weight
        layers, sign, weight = piece.partition("=")
        before.append(layers)
        if sign:
            found.append((",".join(before), weight.strip()))
            before = []
    if before or any(not layers.strip() or "=" in weight for layers, weight in found):
        problems.add(f"cannot read {text!r}, which is no file either{meant(text)}", "weights")
        return []
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
