"""What is printed at the end of a run works as it is printed, for every trainer."""

import io
import shlex
import sys
from pathlib import Path

import pytest

from layerpeft.cli import main
from layerpeft.recipe import shipped
from layerpeft.recipe.after import commands, comparing
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.shipped import recipes
from layerpeft.recipe.trainers.table import ROWS

pytestmark = pytest.mark.usefixtures("shallow")
QUICK = "token_classification"
ALL, FEWER = "layerpeft.select={{by: {}}}", ["--arms", "random:3,last,all"]


def one_each() -> list[str]:
    """A shipped recipe of every trainer, and those whose models or rows are of another kind."""
    found: dict[str, str] = {}
    for name, path in sorted(recipes().items()):
        text = path.read_text()
        trainer = next(line.partition(": ")[2] for line in text.splitlines() if line.startswith("trainer:"))
        found.setdefault(trainer, name if trainer != "sft" else "quickstart")
    return [*found.values(), "whisper", "vision_sft", "regression"]


@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in one_each()])
def test_what_was_trained_is_used_as_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = recipes()[name].read_text()
    if "\ndrop: [" in text:  # names layers that the short model does not have
        monkeypatch.setattr(shipped, "_HERE", Path(shipped.__file__).parent)
    few = ["max_steps=1", "warmup_steps=0", "output_dir=a run", "max_eval_samples=4"]
    few += [] if "toy-" in text or "classification" in text else ["max_train_samples=8"]
    assert main(["train", name, *few]) == 0, capsys.readouterr().err[-1000:]
    said = capsys.readouterr().out
    recipe = load_recipe("a run/recipe.yaml", purpose="plan")
    lines = [line for line in said[said.index("next:") :].splitlines() if line.startswith("  layerpeft ")]
    words = [shlex.split(line, comments=True)[1:] for line in lines]
    used = [line for line in words if line[0] in ("generate", "predict", "eval")]
    assert tuple(line[0] for line in used) == recipe.row.used
    gone = [line for line in words if line[0] in ("merge", "export")]
    assert len(gone) == 1 + (recipe.row.task_type == "CAUSAL_LM")
    for line in [*used, *gone]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        short = ["max_new_tokens=2"] if line[0] in ("generate", "predict") else []  # as it is printed, and quicker
        assert main([*line, *short]) == 0, capsys.readouterr().err
        capsys.readouterr()
    if "predict" in recipe.row.used:
        lines = Path("a run-predictions.csv").read_text(encoding="utf-8").splitlines()
        assert len(lines) > 1 and not all(line.endswith("has no prompt") for line in lines[1:])


def test_every_trainer_has_been_tried() -> None:
    found = {recipes()[name].read_text().partition("\ntrainer: ")[2].split()[0] for name in one_each()}
    assert found == set(ROWS)


def test_text_is_gone_on_from_and_turns_are_talked_to():
    recipe = load_recipe("quickstart", [])
    for row, said in (({"prompt": "a b", "completion": "c"}, "--prompt 'a b'"), ({"messages": []}, "--chat")):
        assert commands(recipe, Path("out"), True, row, None)[0].startswith(f"layerpeft generate out {said} ")


@pytest.mark.parametrize(
    ("name", "settings", "layers", "words"),
    [
        ("quickstart", ["layerpeft.select=last:2"], (3, 4), ["--arms", "random:3,all"]),
        ("quickstart", ["layerpeft.select={layers: 1-2, by: snr, keep: 1}"], (1,), ["--arms", "random:2,last,all"]),
        ("quickstart", ["layerpeft.select=all"], range(5), [ALL.format("gradient_norm, keep: 25%"), *FEWER]),
        (
            "full",
            ["layerpeft.select={exclude: 0}"],
            range(1, 5),
            [ALL.format("gradient_norm, exclude: 0, keep: 25%"), *FEWER],
        ),
        ("dpo", ["layerpeft.select=all"], range(5), [ALL.format("snr, keep: 25%"), *FEWER]),
        ("lisa", [], range(5), FEWER),
        ("quickstart", ["layerpeft.select={layers: 3, by: snr, keep: 1}"], (3,), None),
    ],
)
def test_the_comparison_that_is_printed_has_something_to_compare(
    name: str, settings: list[str], layers: tuple[int, ...], words: list[str] | None
) -> None:
    """Among the same candidates; where all of them trained, fewer beside those."""
    found = comparing(load_recipe(name, settings, "plan"), Path("a run"), layers)
    if words is None:
        assert found == []
        return
    ((*start, recipe), asked) = shlex.split(found[0], comments=True)[:3], shlex.split(found[0], comments=True)[3:]
    assert start == ["layerpeft", "compare"] and recipe == "a run/recipe.yaml" and asked == words
    if len(asked) > 2:
        assert load_recipe(name, [*settings, asked[0]], "compare").config.choosing.keep == "25%"


def test_scores_are_used_again_among_the_same_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    select = "layerpeft.select={by: snr, keep: 1, layers: 0-2, exclude: 1, pick: bottom, seed: 3}"
    assert main(["score", "quickstart", select, "output_dir=out"]) == 0
    said = capsys.readouterr().out
    training, comparison = [shlex.split(line)[1:] for line in said[said.index("next:") :].splitlines()[1:]]
    own, again = (load_recipe("quickstart", words).config.choosing for words in ([select], training[2:]))
    for name in ("keep", "layers", "exclude", "pick", "seed", "stack", "unit"):
        assert getattr(own, name) == getattr(again, name), name
    assert comparison[0] == "compare" and comparison[-1].startswith("random:2,"), "of two candidates"
    assert main(["score", "quickstart", select, "output_dir=out", "eval_dataset=null"]) == 0
    assert "compare" not in capsys.readouterr().out, "nothing is held out"
