"""A run that has learned nothing says so, with a cure that runs as printed; one that has is left alone."""

import math
import shlex
from functools import cache
from pathlib import Path

import pytest

from layerpeft.cli import main
from layerpeft.recipe.learned import unlearned
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import Recipe
from layerpeft.training import report

pytestmark = pytest.mark.usefixtures("shallow")

SET = ["learning_rate=1e-3", "output_dir=out"]
CURES = {
    "slow": ([2.0, 2.0, 1.999], (2.0, 1.999), ["too few, or too small", "learning_rate=0.003", "num_train_epochs=9.0"]),
    "hardly": ([2.0, 1.999], (2.0, 1.999), ["the held-out loss hardly fell (2.0000 before, 1.9990 after)"]),
    "by heart": ([2.0, 1.0, 0.5], (2.0, 2.4), ["learned by heart", "learning_rate=0.00033", "num_train_epochs=1.0"]),
    "too fast": ([2.0, 5.0, 9.0], (2.0, 8.0), ["too high", "learning_rate=0.00033"]),
    "no number": ([2.0, math.nan], (2.0, math.nan), ["too high"]),
    "one loss": ([2.0], (2.0, 2.0), ["loss did not fall (2.0000 before, 2.0000 after)", "too few, or too small"]),
    "small numbers": ([1e-5], (1e-5, 1e-5), ["(1e-05 before, 1e-05 after)"]),
    "one loss, worse": ([2.0], (2.0, 3.0), ["too high"]),
    "no held-out rows": ([2.0, 2.0], None, ["the training loss did not fall (2.0000 at first, 2.0000 at last)"]),
    "learned": ([2.0, 2.0], (2.0, 1.9), []),
    "learned, as far as is known": ([2.0, 1.0], None, []),
    "nothing known": ([2.0], None, []),
}


@cache
def recipe_of(*more: str) -> Recipe:
    return load_recipe("quickstart", [*SET, *more], "plan")


@pytest.mark.parametrize("name", CURES)
def test_the_cure_is_that_of_the_losses(name: str) -> None:
    losses, held, says = CURES[name]
    recipe = recipe_of("num_train_epochs=3", "max_steps=-1")
    before, after = ({"eval_loss": number} for number in held) if held else ({}, {})
    said = unlearned(recipe, [{"loss": loss} for loss in losses] + [{"train_loss": 1.0}], before, after, 30)
    assert (said is None) == (not says) and all(fragment in str(said) for fragment in says)
    if said is not None:
        words = shlex.split(said.splitlines()[-1])
        assert words[:3] == ["layerpeft", "train", "quickstart"] and "output_dir=out-again" in words
        assert len({word.partition("=")[0] for word in words}) == len(words)
    if name == "slow":
        load_recipe(words[2], words[3:])  # and nothing is wrong with it


def test_steps_are_said_as_the_recipe_says_them() -> None:
    said = str(unlearned(recipe_of("max_steps=30"), [{"loss": 2.0}, {"loss": 2.0}], {}, {}, 30))
    assert "max_steps=90" in said and "num_train_epochs" not in said


def test_a_run_says_it_and_makes_its_table_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[object] = []
    changes = report._changes
    monkeypatch.setattr(report, "_changes", lambda *given: made.append(given) or changes(*given))
    few = [
        "max_steps=2",
        "max_train_samples=4",
        "max_eval_samples=2",
        "per_device_train_batch_size=2",
        "sample_tokens=0",
    ]
    few += ["logging_steps=1", "layerpeft.r=2", "layerpeft.select=last:1", "max_length=96", "save_strategy=no"]
    assert main(["train", "quickstart", *few, "output_dir=out", "learning_rate=1e-9", "report_to=none"]) == 0
    said = capsys.readouterr().out
    assert "nothing was learned that shows: the held-out loss did not fall" in said and "max_steps=6" in said
    assert len(made) == 1 and Path("out/layers.csv").read_text().count("\n") > 1
