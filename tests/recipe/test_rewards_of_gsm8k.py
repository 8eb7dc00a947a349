"""The rewards that ship: what an answer earns, and that a small model learns to earn it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from layerpeft.recipe import trainer
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.shipped import find_recipe
from layerpeft.recipe.train import run

ANSWER = "Two days make 6 + 12 = <<6+12=18>>18 eggs.\n#### 18"


def earned(name: str, *completions: str) -> list[float]:
    rewards = runpy.run_path(str(find_recipe("grpo").parent / "gsm8k_rewards.py"))
    prompts = ["Question: How many eggs?\nThe answer ="] * len(completions)
    return rewards[name](prompts=prompts, completions=list(completions), answer=[ANSWER] * len(completions), log=None)


def test_an_answer_earns_more_the_sooner_and_the_nearer_its_number_is() -> None:
    right, near, far, late, none = earned(
        "near_answer", " 18 eggs", " 20", " 900", " it is said that 18", " eggs, many"
    )
    assert right == 1 and right > near > far == 0.5 and right > late > 0 and none == 0
    assert late == pytest.approx(0.5 ** (15 / 12))
    assert earned("correct_answer", " 18.", " 1,8", " 180", " 20, or 18", "") == [1, 1, 0, 0, 0]
    assert earned("on_topic", "how many eggs make eight or so, eggs") == [pytest.approx(0.5 * 4 / 8)]


@pytest.mark.slow
def test_the_reward_of_the_last_steps_is_clearly_above_that_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    make = trainer.make_trainer

    def kept(*given: Any, **changes: Any) -> Any:
        held[:] = [make(*given, **changes)]
        return held[0]

    monkeypatch.setattr("layerpeft.recipe.train.make_trainer", kept)
    alone = ("eval_dataset=null", "max_eval_samples=null", "logging_steps=1", "max_steps=20")
    run(load_recipe("grpo", [*alone, f"output_dir={tmp_path}"]), lambda said: None)
    rewards = [entry["reward"] for entry in held[0].state.log_history if "reward" in entry]
    assert len(rewards) == 20 and max(rewards) <= 2
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
