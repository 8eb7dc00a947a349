"""Layer outlier distribution (OWL, arXiv 2310.05175; OwLore, arXiv 2405.18380): how much of a layer stands far above its mean.

`D_l = 100 · count(A > M · mean(A)) / numel`, in percent, over all weights of the layer's targets, with `A_ij = ‖X_j‖₂ · |W_ij|`.
Of units below a layer the mean is that of the layer they lie in, so that their shares, weighted by size, make up the layer's.

Costs one forward pass over every batch, or none (`activations: false`), and reads every weight twice, in pieces.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerpeft.errors import NothingSeenError, ScoreError
from layerpeft.integrations.torch import add_to, widest
from layerpeft.model.layers import Target
from layerpeft.model.targets import is_routed
from layerpeft.model.weights import weight_slices
from layerpeft.selection.probe import Key, attach_taps
from layerpeft.selection.scorers import OF_TARGETS, Traits
from layerpeft.selection.scoring import Measured, Request, Watching, per_weight
from layerpeft.text import some

TRAITS = Traits(units=OF_TARGETS)


@dataclass(frozen=True)
class Options:
    """`M`: how many times the mean counts as an outlier. `activations: false`: `A = |W|`, no data needed."""

    M: float = 13.0
    activations: bool = True


def needs(options: Options) -> str:
    """Forward passes over batches; the weights alone with `activations: false`."""
    return "forward" if options.activations else "weights"


def score(request: Request, options: Options) -> Measured:
    """The weight-only form, `A = |W|`."""
    return _ratios(request, options, None)


class InputNorms(Watching):
    """Running sums of squares of each target's input features, one vector (in,) per target (and expert)."""

    def __init__(self, request: Request, options: Any) -> None:
        super().__init__(request, options)
        self.squares: dict[Key, torch.Tensor] = {}

    def attach(self) -> None:
        """Puts the hooks on."""
        self._handles = attach_taps(self.request.model, self.request.targets, self._tap)

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        """What some tokens (tokens, in) add."""
        return rows.float().square().sum(0, dtype=widest(rows.device))

    def nothing(self, target: Target) -> torch.Tensor:
        """What a target that saw no token adds."""
        return torch.zeros(target.shape[-1], dtype=torch.float64)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sums the squares over processes, in the order of the targets."""
        for target in self.request.targets:
            experts = range(target.shape[0]) if target.kind == "experts" else range(1)
            for expert in experts:
                mine = self.squares.get((target.name, expert))
                self.squares[target.name, expert] = add(self.nothing(target) if mine is None else mine)

    def result(self) -> Measured:
        """Outlier shares per layer. Raises: ScoreError when a target saw no input."""
        self.refuse_unseen("score")
        return _ratios(self.request, self.options, self.squares)

    def refuse_unseen(self, how: str = "") -> None:
        """Raises: ScoreError when a target saw no input; `how` else its weights are had, if they are."""
        seen = {name for name, _ in self.squares}
        unseen = [t.name for t in self.request.targets if t.name not in seen and not is_routed(t.name)]
        if unseen:
            kind, other = (
                ScoreError if seen else NothingSeenError,
                f", or {how} the weights alone with activations: false",
            )
            raise kind(
                f"{len(unseen)} target(s) were never called: {some(unseen)}. "
                f"Leave them out of target_modules{other if how else ''}."
            )

    def _tap(self, y: torch.Tensor, x: torch.Tensor, keys: Mapping[Key, Any]) -> torch.Tensor:
        self._running = True
        with torch.no_grad():
            flat = x.detach().reshape(-1, x.shape[-1])
            for key, rows in keys.items():
                add_to(self.squares, key, self.part(flat if rows is None else flat[rows]))
        return y


start = InputNorms


def _ratios(request: Request, options: Options, squares: Mapping[Key, torch.Tensor] | None) -> Measured:
    highest = 0.0
    outliers: dict[str, float] = {}
    blocks: dict[int, list[Target]] = {}
    for target in request.targets:
        blocks.setdefault(request.layers.block(target.layer).index, []).append(target)
    for targets in blocks.values():
        total, count = 0.0, 0
        for _, block in _blocks(request, targets, squares):
            total += float(block.sum(dtype=widest(block.device)))
            count += block.numel()
        mean = total / count
        above: dict[str, int] = {t.name: 0 for t in targets}
        for name, block in _blocks(request, targets, squares):
            above[name] += int((block > options.M * mean).sum())
            highest = max(highest, float(block.max()) / mean if mean else 0.0)
        outliers |= above
    percent = {name: 100.0 * count for name, count in outliers.items()}
    values = tuple(per_weight(request.layers, request.targets, percent))
    if not any(values):
        lower = next((m for m in (10, 7, 5, 4, 3, 2) if m < min(highest, options.M)), round(0.8 * highest, 2))
        raise ScoreError(
            f"no weight of any layer is an outlier at M = {options.M:g}: the largest is {highest:.1f} times its layer's mean. "
            f"Lower it, for example M: {lower}."
        )
    return Measured(values, {t.name: percent[t.name] / t.params for t in request.targets})


def _blocks(
    request: Request, targets: list[Target], squares: Mapping[Key, torch.Tensor] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """`A` in pieces of some rows (rows, in): no target is ever copied whole, and no layer is concatenated."""
    for target in targets:
        for expert, rows in weight_slices(request.model, target):
            block = rows.abs()
            if squares is not None:
                square = squares.get((target.name, expert))
                norms = torch.zeros(rows.shape[-1]) if square is None else square.sqrt()
                block = block * norms.to(device=block.device, dtype=block.dtype)
            yield target.name, block
