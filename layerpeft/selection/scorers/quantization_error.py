"""What rounding a layer's weights to a precision loses: `Σ over its targets of ‖W - Q(W)‖²`, in the unit of the weights, squared.

With `activations: true` the columns of the error weigh what the inputs do, `Σ_j ‖X_j‖² · ‖(W - Q(W))_:j‖²`, as in AWQ and GPTQ's
diagonal: the squared error of the layer's outputs if its inputs were uncorrelated, summed over all tokens that were seen.
Each target is rounded as it would be stored; nothing in the model is changed.

Costs the rounding of every weight once, some rows at a time or (HQQ, `double_quant`) one whole matrix, and with `activations` one
forward pass over every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.integrations.bitsandbytes import BLOCK
from layerpeft.integrations.torch import widest
from layerpeft.model import weights
from layerpeft.model.layers import Target
from layerpeft.model.precisions import KEPT, Storage, apart, fits, missing_packages, named, rounded, written
from layerpeft.model.targets import MATRICES
from layerpeft.model.weights import in_pieces, matrices
from layerpeft.selection.probe import Key
from layerpeft.selection.scorers import OF_TARGETS, Traits, outliers
from layerpeft.selection.scoring import Measured, Request, per_layer
from layerpeft.selection.typecheck import checked
from layerpeft.text import some

TRAITS = Traits(of_whole=True, units=OF_TARGETS)  # a sum over weights


@dataclass(frozen=True)
class Rounding:
    """`precision`: a name or bits, HQQ's with a scale for `group_size` weights, bitsandbytes' 4-bit scales with `double_quant`."""

    precision: str | int = "nf4"
    group_size: int = checked(64, least=1, of={"precision": written(lambda row: row.package == "hqq")})
    double_quant: bool = checked(
        False, of={"precision": written(lambda row: row.package == "bitsandbytes" and row.bits == 4)}
    )

    def __post_init__(self) -> None:
        """Gives the precision its name. Raises: ScoreError for one that does not round, or whose package is missing."""
        try:
            name = named(self.precision)
        except ValueError as error:
            raise ScoreError(f"precision: {error}") from error
        if name == KEPT:
            raise ScoreError(
                f"precision: {self.precision!r} leaves weights as they are, so that every layer's error is 0"
            )
        for package in missing_packages([name]):
            raise ScoreError(f"precision: {name} needs the package {package} (pip install {package})")
        object.__setattr__(self, "precision", name)

    @property
    def storage(self) -> Storage:
        """How the weights are packed."""
        return Storage(self.group_size, self.double_quant)


@dataclass(frozen=True)
class Options(Rounding):
    """As `Rounding`. `activations`: weigh by the inputs, needs data. `relative`: divide by the same sum over W itself."""

    activations: bool = False
    relative: bool = False


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


class WeighedErrors(outliers.InputNorms):
    """The running measurement: the norms of the input features of every target, as weights of what rounding loses."""

    def result(self) -> Measured:
        """Weighed errors per layer and per target. Raises: ScoreError when a target saw no input."""
        self.refuse_unseen("take")
        return _errors(self.request, self.options, self.squares)


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
    lost = whole = 0.0
    for expert, weight in matrices(model, target):
        columns, own = torch.zeros(2, weight.shape[1], dtype=widest(weight.device), device=weight.device)
        name = str(options.precision)
        some_rows = max(1, weights.PIECE // weight.shape[1] // BLOCK) * BLOCK
        for part in weight.split(some_rows if apart(name, options.storage) else len(weight)):
            after = rounded(part.contiguous(), name, options.storage)
            for was, now in zip(in_pieces(part), in_pieces(after), strict=True):
                columns += (was - now).square_().to(columns).sum(0)
                own += was.square_().to(own).sum(0)
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
    odd = [
        t.name for t in request.targets if not fits(str(options.precision), t.shape[-2], t.shape[-1], options.storage)
    ]
    if odd:
        raise ScoreError(
            f"{len(odd)} target(s) do not fit {options.precision} in groups of {options.group_size}: {some(odd)}; "
            "give another group_size, or another precision"
        )
