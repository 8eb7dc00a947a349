"""One arm that steps on one batch, and what its refreshes add to the time of a step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import clock, count
from benchmarks.arm import Arm
from benchmarks.model import Batch, Model, batches, build
from benchmarks.setting import Setting, prepare


class Steps:
    """One arm that steps on one batch; state: the number of the next step."""

    def __init__(self, arm: Arm, model: Model, batch: Batch, setting: Setting, seed: int, device: str = "cpu") -> None:
        built: Any = build(model, device, seed)
        vocabulary = built.config.vocab_size
        self.ready = prepare(arm.build(built), setting)
        self.batch = batches(model, batch, vocabulary, seed=seed, device=device)[0]
        self.number = 0

    def __call__(self) -> None:
        count.step(self.ready, self.batch, self.number)
        self.number += 1

    def counts(self) -> dict[str, int]:
        """The counts of a step."""
        found = count.counts(self.ready, self.batch, self.number)
        self.number += 1
        return found

    def refreshes(self, times: Sequence[float], gap: int) -> dict[str, float]:
        """What refreshes add: the mean over all steps, in usual steps (the median). Empty where too few steps were timed to tell.

        Where everything is refreshed in one step, that step is made once; else the timed steps have to hold whole gaps.
        """
        usual = statistics.median(times)
        if self.ready.refresh is not None:
            self.ready.refresh()
            mean = 1 + (clock.seconds(self) / usual - 1) / gap
        elif len(times) % gap == 0:
            mean = statistics.mean(times) / usual
        else:
            return {}
        return {"mean_over_usual_step": round(mean, 4)}
