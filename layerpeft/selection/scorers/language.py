"""How alike a layer's states are for the same text in two languages.

The batches hold parallel rows: row 0 and 1 say the same in two languages, so do row 2 and 3, and so on. Rows are pooled to
their mean over tokens and compared by cosine:

- `measure: retrieval`: share of rows whose nearest row of the other language (the first rows of the pairs are the one, the
  second rows the other) is their own translation, over both directions, as Liu & Niehues ("Middle-Layer Representation
  Alignment", ACL 2025, arXiv 2502.14830) measure it;
- `measure: gap`: mean cosine of translations, minus that of rows of two languages that are none; which a common direction of
  all states, that makes every cosine high, leaves alone.

They find the middle layers aligned best, and aligning those further helps transfer most: so a high score is trained first.
Whoever wants to train where languages are still apart writes `first: low`.

Costs the forward passes. Pairs are compared within groups of `pairs`, over batches; a group's means lie on the CPU. A trainer
shuffles rows, so the scores are made beforehand (`batches=…`, `score_layers`), and not on the first step of training.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.errors import ScoreError
from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.scoring import Request
from layerpeft.selection.states import First, Passage, RowSums
from layerpeft.selection.typecheck import checked

TRAITS = Traits(ordered=True, units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`measure`: how alikeness is told; `pairs`: of a group."""

    measure: Literal["retrieval", "gap"] = "retrieval"
    pairs: int = checked(128, least=2)


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


def alikeness(a: torch.Tensor, b: torch.Tensor, measure: str) -> float:
    """Of (pairs, width) in two languages; ties are no hits."""
    likeness = torch.nn.functional.normalize(a.double(), dim=-1) @ torch.nn.functional.normalize(b.double(), dim=-1).T
    own, others = likeness.diagonal(), likeness.clone().fill_diagonal_(-torch.inf)
    if measure == "gap":
        return float(own.mean() - (likeness.sum() - own.sum()) / (likeness.numel() - len(own)))
    return float(torch.cat([own > others.amax(0), own > others.amax(1)]).double().mean())


class Parallel(RowSums):
    """The running measurement: the means of rows, pair by pair, until a group is full."""

    entering = False
    name, what, least = "language", "parallel rows", 4

    def __init__(self, request: Request, options: Options) -> None:
        if request.live:
            raise ScoreError(
                "by: language is measured on parallel rows in their order, and a trainer shuffles them; pass them as batches=…, or "
                "save the scores (score_layers(…, by='language', batches=…).save('scores.json')) and choose by: scores.json"
            )
        super().__init__(request, options)
        self.size = 2 * options.pairs

    def rows(self, passage: Passage) -> torch.Tensor:
        """(rows, width)."""
        found = passage.pooled(passage.after, "mean")
        if len(found) % 2:
            raise ScoreError(
                f"language: rows come in pairs (row 0 with row 1, 2 with 3, …), and a batch has {len(found)} that are not empty"
            )
        return found

    def close(self, rows: torch.Tensor) -> torch.Tensor:
        """The group's score times its pairs, and how many those are."""
        score = alikeness(rows[::2], rows[1::2], self.options.measure)
        return torch.tensor([score * len(rows), len(rows)], dtype=torch.float64)


start = Parallel
