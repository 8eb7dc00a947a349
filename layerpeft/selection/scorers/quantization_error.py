"""What rounding a layer's weights to a precision loses: `Σ over its targets of ‖W - Q(W)‖²`, in the unit of the weights, squared.

With `activations: true` the columns of the error weigh what the inputs do, `Σ_j ‖X_j‖² · ‖(W - Q(W))_:j‖²`, as in AWQ and GPTQ's
diagonal: the squared error of the layer's outputs if its inputs were uncorrelated, summed over all tokens that were seen.
Each target is rounded as it would be stored; nothing in the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.model.layers import Target
from layerpeft.model.precisions import KEPT, Storage, fits, missing_packages, named, rounded
from layerpeft.model.targets import MATRICES, is_routed
from layerpeft.model.weights import matrices
from layerpeft.selection.probe import Key
from layerpeft.selection.scorers import Traits, outliers
from layerpeft.selection.scoring import Measured, Request, per_layer
from layerpeft.text import some

TRAITS = Traits(of_whole=True)  # a sum over weights


@dataclass(frozen=True)
class Options:
    """`precision`: a name or bits, HQQ's with a scale for `group_size` weights, bitsandbytes' 4-bit scales with `double_quant`.

    `activations`: weigh by the inputs, needs data. `relative`: divide by the same sum over W itself.
    """

    precision: str | int = "nf4"
    group_size: int = 64
    double_quant: bool = False
    activations: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", rounding_precision(self.precision))


def rounding_precision(value: str | int) -> str:
    """The name of a precision that rounds. Raises: ScoreError for what is none, or whose package is missing."""
    try:
        name = named(value)
    except ValueError as error:
        raise ScoreError(f"precision: {error}") from error
    if name == KEPT:
        raise ScoreError(f"precision: {value!r} leaves weights as they are, so that every layer's error is 0")
    for package in missing_packages([name]):
        raise ScoreError(f"precision: {name} needs the package {package} (pip install {package})")
    return name


def needs(options: Options) -> str:
    """The weights alone; forward passes over batches with `activations: true`."""
    return "forward" if options.activations else "weights"


def score(request: Request, options: Options) -> Measured:
    """The form without data."""
    return _errors(request, options, None)


def start(request: Request, options: Options) -> WeighedErrors:
    """Begins the measurement of the inputs' norms."""
    _check(request, options)
    return WeighedErrors(request, options)


class WeighedErrors:
    """The running measurement: the norms of the input features of every target."""

    def __init__(self, request: Request, options: Options) -> None:
        self.request, self.options = request, options
        self._norms = outliers.InputNorms(request, outliers.Options())

    @property
    def batches(self) -> int:
        """Batches that have come through."""
        return self._norms.batches

    def attach(self) -> None:
        """Puts the hooks on."""
        self._norms.attach()

    def next_batch(self, scale: float | None = None) -> None:
        """Closes the batch."""
        self._norms.next_batch(scale)

    def detach(self) -> None:
        """Takes the hooks off."""
        self._norms.detach()

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums the squared norms over processes."""
        self._norms.combine(add)

    def result(self) -> Measured:
        """Weighed errors per layer and per target. Raises: ScoreError when a target saw no input."""
        squares = self._norms.squares
        seen = {name for name, _ in squares}
        unseen = [t.name for t in self.request.targets if t.name not in seen and not is_routed(t.name)]
        if unseen:
            raise ScoreError(
                f"{len(unseen)} target(s) were never called: {some(unseen)}. "
                "Leave them out of target_modules, or take the weights alone with activations: false."
            )
        return _errors(self.request, self.options, squares)


def _errors(request: Request, options: Options, squares: Mapping[Key, torch.Tensor] | None) -> Measured:
    _check(request, options)
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    for target in request.targets:
        lost[target.name], whole[target.name] = _target_error(request.model, target, options, squares)
    if not any(lost.values()):
        raise ScoreError(
            f"rounding to {options.precision} changes no weight of these layers: they are stored so already, or are all 0"
        )
    values = per_layer(request.layers, request.targets, lost)
    if not options.relative:
        return Measured(tuple(values), lost)
    sizes = per_layer(request.layers, request.targets, whole)
    shares = {name: error / whole[name] if whole[name] else 0.0 for name, error in lost.items()}
    return Measured(tuple(v / s if s else 0.0 for v, s in zip(values, sizes, strict=True)), shares)


def _target_error(
    model: nn.Module, target: Target, options: Options, squares: Mapping[Key, torch.Tensor] | None
) -> tuple[float, float]:
    """(error, the same sum over the weight itself), over all experts of a target."""
    storage = Storage(options.group_size, options.double_quant)
    lost = whole = 0.0
    for expert, weight in matrices(model, target):
        after = rounded(weight.contiguous(), str(options.precision), storage)
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        columns = (weight.float() - after.float()).square().sum(0, dtype=wide)
        own = weight.float().square().sum(0, dtype=wide)
        if squares is not None:
            square = squares.get((target.name, expert))
            factors = torch.zeros_like(columns) if square is None else square.to(columns)
            columns, own = columns * factors, own * factors
        lost, whole = lost + float(columns.sum()), whole + float(own.sum())
    return lost, whole


def _check(request: Request, options: Options) -> None:
    unfit = [t.name for t in request.targets if t.kind not in MATRICES]
    if unfit:
        raise ScoreError(
            f"quantization_error is measured on linears, Conv1D and experts; not on {', '.join(unfit[:6])}. "
            "Leave them out of target_modules, or choose by another scorer."
        )
    storage = Storage(options.group_size, options.double_quant)
    odd = [t.name for t in request.targets if not fits(str(options.precision), t.shape[-2], t.shape[-1], storage)]
    if odd:
        raise ScoreError(
            f"{len(odd)} target(s) do not fit {options.precision} in groups of {options.group_size}: {some(odd)}; "
            "give another group_size, or another precision"
        )
