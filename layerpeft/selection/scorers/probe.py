"""How well a linear classifier tells the rows' classes from a layer's states: accuracy on rows that it was not fitted to.

Linear probes (Alain & Bengio, arXiv 1610.01644), as those that look for truth, safety or hallucination in hidden states use
them layer by layer (for example CLAP's baselines, arXiv 2509.09700). Here ridge regression on the classes' indicators, in
closed form: fitted to all folds but one, tried on that one, for each fold in turn. Folds are dealt class by class in the order
of the rows, so nothing is random. States are centred, `ridge` is relative to their mean squared length.

The classes are the batches' `labels`, one per row (a model with a classification head), or their `classes`, which no model
sees, for any other model. `form: accuracy` is the accuracy after the layer, `gain` that minus the accuracy on what enters it.

A high score is trained first: that layer has what the task asks for (or, as gain, works it out). The papers look for the layer
to read from, not to train, so `first: low` turns the sign.

Costs the forward passes, and 2·folds·rows²·(width + rows) operations per layer at the end; rows·width float32 numbers of every
layer lie on the CPU (twice that for `gain`).
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.states import First, Passage, RowSums
from layerpeft.selection.typecheck import checked

TRAITS = Traits(classes=True, units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`form`: accuracy, or what the layer adds to it; `pool`: a row's `last` token or its `mean`; `folds`; `ridge`."""

    form: Literal["accuracy", "gain"] = "accuracy"
    pool: Literal["last", "mean"] = "last"
    folds: int = checked(5, least=2)
    ridge: float = checked(0.1, above=0)


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


def held_out(x: torch.Tensor, classes: torch.Tensor, folds: int = 5, ridge: float = 0.1) -> float:
    """Accuracy on held-out rows of (rows, width), with the class of each (rows,).

    Raises: ScoreError for fewer than two classes, or fewer rows than folds.
    """
    known, y = classes.unique(return_inverse=True)
    if len(known) < 2 or len(y) < folds:
        raise ScoreError(
            f"probe: {len(y)} rows of {len(known)} class(es); it needs {folds} rows (folds) and two classes at least: give more "
            "batches (num_batches)"
        )
    order = y.argsort(stable=True)
    fold = torch.empty_like(y)
    fold[order] = torch.arange(len(y)) % folds
    x, targets, right = x.double(), torch.nn.functional.one_hot(y).double(), 0
    for number in range(folds):
        fitted, tried = fold != number, fold == number
        middle, shares = x[fitted].mean(0), targets[fitted].mean(0)
        inside, outside = x[fitted] - middle, x[tried] - middle
        kernel = inside @ inside.T
        damping = ridge * float(kernel.diagonal().mean()) or 1.0
        weights = torch.linalg.solve(kernel + damping * torch.eye(len(kernel)).double(), targets[fitted] - shares)
        right += int(((outside @ inside.T @ weights + shares).argmax(-1) == y[tried]).sum())
    return right / len(y)


class Probes(RowSums):
    """The running measurement: the pooled states of all rows with their classes."""

    name, size = "probe", sys.maxsize

    def attach(self) -> None:
        """Puts the hooks on; the first takes the classes out of what the model gets."""
        self._classes: torch.Tensor | None = None
        self._handles.append(self._model.register_forward_pre_hook(self._take, with_kwargs=True))
        super().attach()

    def rows(self, passage: Passage) -> torch.Tensor:
        """(rows, width + 1), or (rows, 2·width + 1) with what entered first; the class comes last."""
        states = (passage.before, passage.after) if self.options.form == "gain" else (passage.after,)
        pooled = [passage.pooled(s, self.options.pool).float() for s in states]
        return torch.cat([*pooled, self._known(len(pooled[0])).to(pooled[0])], -1)

    def close(self, rows: torch.Tensor) -> torch.Tensor:
        """The score of all rows."""
        *sides, classes = rows[:, :-1].chunk(2 if self.options.form == "gain" else 1, -1) + (rows[:, -1],)
        found = [held_out(x, classes, self.options.folds, self.options.ridge) for x in sides]
        return torch.tensor([found[-1] - (found[0] if len(found) > 1 else 0.0)], dtype=torch.float64)

    def value(self, sums: torch.Tensor) -> float:
        """The same."""
        return float(sums[0])

    def _take(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._classes = kwargs.get("classes")
        return args, {k: v for k, v in kwargs.items() if k != "classes"}

    def _known(self, rows: int) -> torch.Tensor:
        """(rows, 1). Raises: ScoreError where a row has not one class."""
        found = self._classes if self._classes is not None else self._given.get("labels")
        if not isinstance(found, torch.Tensor) or found.is_floating_point() or found.numel() != rows:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else "none"
            raise ScoreError(
                f"probe: tells classes of rows, and a batch has {rows} texts and labels of the shape {shape}; give every batch "
                "`classes`, a tensor of one whole number per row (the model does not get it), or train a classification head"
            )
        return found.reshape(-1, 1)


start = Probes
