"""How many layers to take, from the scores themselves: a two-class split (Otsu 1979), IR-Tuning's windowed one, as many as make
up a share of the sum (ESFT, arXiv 2407.01906: of the routing of a layer, `within: layer`), or all above a number (LS-LoRA)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerpeft.errors import SelectionError
from layerpeft.selection.picks import Traits
from layerpeft.selection.typecheck import checked

TRAITS = Traits(decides=True)  # the scores say how many


@dataclass(frozen=True)
class Options:
    """`split`: `otsu` weighs both classes by their size; `ir_tuning` (arXiv 2510.00268) adds the unweighted variances and
    looks only at cuts within `window` (shares of the number of layers); `cumulative` takes the best until they make up `share` of
    the sum (ESFT's p: 0.2 of tokens, 0.1 of gates); `threshold` takes every score above `threshold` (LS-LoRA's cosine below 0.85
    is an influence above 0.15)."""

    split: Literal["otsu", "ir_tuning", "cumulative", "threshold"] = "otsu"
    window: tuple[float, float] = checked((0.35, 0.65), of={"split": ("ir_tuning",)})
    share: float = checked(0.2, above=0, most=1, of={"split": ("cumulative",)})
    threshold: float = checked(0.15, of={"split": ("threshold",)})


def pick(scores: Sequence[float], keep: int | None, seed: int, options: Options) -> list[int]:
    """Positions of the high class, best first.

    Raises: SelectionError when all scores are equal, so that there is nothing to split, make up no sum, or lie below the threshold.
    """
    if options.split == "cumulative":
        return until(scores, options.share)
    if options.split != "threshold" and len(set(scores)) < 2:
        raise SelectionError("pick: split needs at least two different scores")
    ascending = sorted(scores)
    if options.split == "threshold":
        low = sum(s <= options.threshold for s in scores)
        if low == len(scores):
            best = f"{ascending[-1]:.4g}"
            raise SelectionError(f"split: threshold: no score is above {options.threshold:g}, the highest is {best}")
    else:
        low = otsu_cut(ascending) if options.split == "otsu" else windowed_cut(ascending, options.window)
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: len(scores) - low]


def until(scores: Sequence[float], share: float) -> list[int]:
    """Positions, best first, until their scores reach a share of the sum; ties by index."""
    total = sum(scores)
    if total <= 0 or min(scores) < 0:
        raise SelectionError("split: cumulative takes a share of the scores' sum: none may be below 0, and not all 0")
    found: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if sum(scores[j] for j in found) >= share * total * (1 - 1e-12):
            break
        found.append(i)
    return found


def otsu_cut(ascending: Sequence[float]) -> int:
    """Size of the low class that makes the within-class variance least."""
    n = len(ascending)
    within = [(k * _variance(ascending[:k]) + (n - k) * _variance(ascending[k:])) / n for k in range(1, n)]
    return within.index(min(within)) + 1


def variance_sums(ascending: Sequence[float]) -> list[float]:
    """`Var(lowest k) + Var(rest)` for k = 1 … n-1 (population variances, unweighted)."""
    return [_variance(ascending[:k]) + _variance(ascending[k:]) for k in range(1, len(ascending))]


def windowed_cut(ascending: Sequence[float], window: tuple[float, float]) -> int:
    """Size of the low class by IR-Tuning's rule, as its paper means it (its code trains one layer more)."""
    n = len(ascending)
    sums = variance_sums(ascending)
    first, last = int(n * window[0]), min(int(n * window[1]), n - 2)
    if first > last:
        raise SelectionError(f"split: the window {window} holds no cut of {n} layers")
    inside = sums[first : last + 1]
    return first + inside.index(min(inside)) + 1


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)
