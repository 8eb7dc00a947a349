"""Learning rates that are tried for each arm, on a seed that does not count."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from layerpeft.errors import Problems, RecipeError, unknown
from layerpeft.recipe.comparing.names import OURS

SEED = 10_007  # what is added to the recipe's seed where rates are tried
HIGHEST = 1_000_000
_RATE = r"x?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"


@dataclass(frozen=True)
class Rates:
    """Rates to try, as they were written (`x2`: twice the arm's own): for every arm, and for some by name."""

    all: tuple[str, ...] = ()
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def tried(self) -> bool:
        """Whether any are."""
        return bool(self.all or self.own)

    def of(self, arm: str, rate: float) -> tuple[float, ...]:
        """Those to try for an arm whose own rate is this; none where it keeps that."""
        asked = self.own.get(arm, self.own.get(arm.partition(":")[0], self.all))
        return tuple(dict.fromkeys(float(r[1:]) * rate if r.startswith("x") else float(r) for r in asked))


def parse_rates(texts: Sequence[str], arms: Sequence[str]) -> Rates:
    """Rates as "1e-3,3e-3" or "x0.3,x1,x3" for every arm, "lisa=1e-3,3e-3" for one ("recipe": its own).

    Raises: RecipeError naming every problem.
    """
    problems = Problems("--rates")
    whole: tuple[str, ...] = ()
    own: dict[str, tuple[str, ...]] = {}
    for text in texts:
        arm, equals, given = text.rpartition("=")
        rates = tuple(part.strip() for part in given.split(","))
        wrong = [r for r in rates if not re.fullmatch(_RATE, r) or not 0 < float(r.removeprefix("x")) <= HIGHEST]
        for rate in wrong:
            text = "write them as 1e-3,3e-3, or as x0.3,x1,x3 of the arm's own"
            problems.add(f"{rate!r} is no learning rate above 0 and up to {HIGHEST:,}; {text}")
        if equals and arm not in (OURS, *arms):
            problems.add(unknown("arm", arm, (OURS, *arms)))
        elif arm in own or not equals and whole:
            problems.add(f"{text!r}: rates of {arm or 'every arm'} are given twice")
        elif equals:
            own[arm] = rates
        else:
            whole = rates
    problems.raise_if_any(RecipeError)
    return Rates(whole, own)
