"""What projection has trained so far: the sum of low-rank pieces, kept as factors until they would be larger than the sum."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Factors = tuple[torch.Tensor, torch.Tensor]  # (out, k), (k, in); with experts, a leading dimension each


@dataclass
class Folds:
    """`Σ left_i right_i` (out, in) in float32 (float64 for such weights), on the CPU. `count`: how many folds there were.

    `experts`: so many sums side by side, (experts, out, in), whose factors have the same number of columns. Pieces may be those of
    some rows, or columns, of the whole, which `out` and `into` are of all the same.
    """

    out: int
    into: int
    pieces: list[Factors] = field(default_factory=list)
    dense: torch.Tensor | None = None
    count: int = 0
    experts: int = 0

    @property
    def rank(self) -> int:
        """Columns of all factors together."""
        return min(self.out, self.into) if self.dense is not None else sum(left.shape[-1] for left, _ in self.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes that the sum takes."""
        held = [t for pair in self.pieces for t in pair] + ([self.dense] if self.dense is not None else [])
        return sum(t.nbytes for t in held)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds a piece (…, out, r), (…, r, in); as one dense sum from where factors would be larger."""
        self.count += 1
        piece = left.detach().cpu().clone(), right.detach().cpu().clone()
        if self.dense is None and self.rank + left.shape[-1] < min(self.out, self.into):
            self.pieces.append(piece)
            return
        last = piece[0] @ piece[1]
        self.dense = last if self.dense is None and not self.pieces else self.sum() + last
        self.pieces = []

    def sum(self, which: Any = ...) -> torch.Tensor:
        """The whole, (…, out, in), or that of one expert."""
        if self.dense is not None:
            return self.dense[which]
        if not self.pieces:
            return torch.zeros(*self._many, self.out, self.into)[which]
        left, right = stacked(self.pieces)
        return left[which] @ right[which]

    def factors(self) -> Factors:
        """Factors whose product is the sum: stacked pieces, or the dense sum beside an identity, which is exact, too."""
        if self.dense is None:
            none = torch.zeros(*self._many, self.out, 0), torch.zeros(*self._many, 0, self.into)
            return stacked(self.pieces) if self.pieces else none
        return exactly(self.dense)

    @property
    def _many(self) -> tuple[int, ...]:
        return (self.experts,) if self.experts else ()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors."""
        found = {"count": torch.tensor(self.count)}
        if self.dense is not None:
            found["dense"] = self.dense
        for number, (left, right) in enumerate(self.pieces):
            found |= {f"{number}.left": left, f"{number}.right": right}
        return found

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state` gave."""
        self.count, self.dense = int(state["count"]), state.get("dense")
        many = sum(1 for k in state if k.endswith(".left"))
        self.pieces = [(state[f"{i}.left"], state[f"{i}.right"]) for i in range(many)]


def stacked(pieces: list[Factors]) -> Factors:
    """One pair of factors (…, out, Σr), (…, Σr, in) for the sum of all."""
    return torch.cat([left for left, _ in pieces], -1), torch.cat([right for _, right in pieces], -2)


def exactly(whole: torch.Tensor) -> Factors:
    """Factors of a dense matrix without rounding: itself and an identity, the smaller one."""
    *many, out, into = whole.shape
    if out < into:
        return torch.eye(out, dtype=whole.dtype).expand(*many, -1, -1), whole
    return whole, torch.eye(into, dtype=whole.dtype).expand(*many, -1, -1)


def recompressed(pair: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest pair of at most `rank`, by QR of both and a small SVD; and the relative error (Frobenius) that this leaves.

    With experts each has its own nearest pair, and the error is that of all together.
    """
    left, right = pair
    if left.shape[-1] <= rank:
        return pair, 0.0
    ql, rl = torch.linalg.qr(left.double())
    qr, rr = torch.linalg.qr(right.mT.double())
    u, s, vh = torch.linalg.svd(rl @ rr.mT, full_matrices=False)
    lost, whole = s[..., rank:].square().sum(), s.square().sum()
    root = s[..., :rank].sqrt()
    new = (
        ((ql @ u[..., :rank]) * root[..., None, :]).to(left.dtype),
        (root[..., None] * (vh[..., :rank, :] @ qr.mT)).to(right.dtype),
    )
    return (new[0].contiguous(), new[1].contiguous()), float((lost / whole).sqrt()) if whole > 0 else 0.0


def stochastically(whole: torch.Tensor, dtype: torch.dtype, draws: torch.Generator | torch.Tensor) -> torch.Tensor:
    """Float32 numbers in a shorter dtype, rounded up or down at random (by numbers from 0 to 1) so that the mean is kept."""
    near = whole.to(dtype)
    towards = torch.full_like(near, float("inf")).copysign((whole - near.float()).to(dtype))
    other = torch.nextafter(near, towards)
    gap = other.float() - near.float()
    chance = torch.where(gap != 0, (whole - near.float()) / gap, torch.zeros_like(whole))
    draws = torch.rand(whole.shape, generator=draws) if isinstance(draws, torch.Generator) else draws
    return torch.where((draws.to(whole.device) < chance) & (whole != near.float()), other, near)


def part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of one owner, without its name."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
