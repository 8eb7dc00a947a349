"""What else than `‖G‖²` the probe may take of the gradient G (out, in) of a weight, without holding one whole."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from layerpeft.integrations.torch import widest
from layerpeft.model.weights import PIECE
from layerpeft.selection.draws import seed_of
from layerpeft.selection.probe import Exact, Mean, Sketch

SAMPLED = 4  # rows for each of `k`, of which agreement is told


@dataclass(frozen=True)
class Running(Sketch):
    """`‖mean over batches of G‖²`: sketches `ΩᵀG/√k` with one Ω for all batches, so that they may be added."""

    power: ClassVar[int] = 1
    whole: ClassVar[bool] = False

    def part(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(k, in)."""
        return ((gy @ self.omega(key, "all", gy.shape[1], gy)).T @ x).float() / self.k**0.5

    def value(self, kept: torch.Tensor, batches: int) -> float:
        """Of the mean over the batches."""
        return float(kept.square().sum(dtype=widest(kept.device))) / batches**2


@dataclass(frozen=True)
class Nuclear(Sketch):
    """The nuclear norm `Σσ` of G, from its k strongest directions, and how much it may be more.

    What the sketch finds of G is a projection, so its nuclear norm is never above that of G. What is left over has a nuclear norm
    of at most `sqrt(rank) · ‖·‖`; its Frobenius norm is estimated by the other k directions, its rank is at most `min(out, in,
    tokens) - k`. With `exact` G is formed, one weight at a time, and nothing is left over.
    """

    exact: bool = False
    power: ClassVar[int] = 1

    def part(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(2,): the norm, and how much is left over at most."""
        if self.exact:
            found = torch.linalg.svdvals((gy.T @ x).float()).sum()
            return torch.stack([found, torch.zeros_like(found)])
        inside, outside = self.split(key, batch, gy, x)
        rank = max(0, min(*gy.shape, x.shape[1]) - self.k)
        return torch.stack([torch.linalg.svdvals(inside).sum(), (rank / self.k) ** 0.5 * outside.norm()])

    def value(self, kept: torch.Tensor, batches: int) -> float:
        """The mean over batches of the norm."""
        return float(kept[0]) / batches


@dataclass(frozen=True)
class Absolute(Mean):
    """`Σ|G_ij|`: some rows of G at a time, added up at once."""

    power: ClassVar[int] = 1

    def part(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A scalar."""
        step = max(1, PIECE // x.shape[1])
        blocks = (gy[:, i : i + step].T @ x for i in range(0, gy.shape[1], step))
        return torch.stack([block.abs().sum(dtype=widest(x.device)) for block in blocks]).sum()


@dataclass(frozen=True)
class Norm(Exact):
    """`‖G‖`, formed one at a time."""

    power: ClassVar[int] = 1

    def part(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A scalar."""
        return self.energy(key, batch, gy, x).sqrt()


@dataclass(frozen=True)
class Agreement:
    """How far batches want the same of an element: `|mean over batches of g| / rms over batches of g`, the mean over elements.

    1: all batches want the same; `sqrt(2 / πB)`: B batches of pure noise. Elements are those of 4k rows of G, drawn from (seed,
    target) and formed exactly, so that 8k rows are held per weight, and the mean over them is an unbiased estimate of that over
    all; with 4k = out it is that. Elements that no batch reaches say nothing.
    """

    k: int = 8
    seed: int = 0
    power: ClassVar[int] = 1
    whole: ClassVar[bool] = False

    def part(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(4k, in): so many rows of G."""
        generator = torch.Generator().manual_seed(seed_of(f"{self.seed}|{key}|rows"))
        rows = torch.randperm(gy.shape[1], generator=generator)[: SAMPLED * self.k].sort().values.to(gy.device)
        return (gy[:, rows].T @ x).float()

    def kept(self, part: torch.Tensor) -> torch.Tensor:
        """(2, 4k, in): they and their squares."""
        return torch.stack([part, part.square()])

    def value(self, kept: torch.Tensor, batches: int) -> float:
        """NaN where no batch reaches any of them."""
        reached = kept[1] > 0
        return float((kept[0][reached].abs() / (batches * kept[1][reached]).sqrt()).mean())
