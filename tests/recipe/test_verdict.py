"""What a comparison says of its numbers: never more than its draws, seeds and held-out rows carry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from layerpeft.recipe.comparing.apart import trained_on
from layerpeft.recipe.comparing.runs import Run
from layerpeft.recipe.comparing.shown import Comparison, labels, table
from layerpeft.recipe.comparing.verdict import Basis, Verdict, interval, judge, judge_arms, standings
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import prepare, tokenized
from tests.helpers.short import short_llama

DRAWS = [2.10, 2.11, 2.12]
THREE = Basis(3, 1000)


def runs(**values: Sequence[float]) -> list[Run]:
    """Of each arm under as many seeds; `random_1` is a draw."""
    found = []
    for arm, numbers in values.items():
        name = arm.replace("_", ":")
        found += [Run(name, (0,), 1, value, 1.0, {}, seed) for seed, value in enumerate(numbers)]
    return found


def chosen(ours: float, draws: Sequence[float], **others: float) -> list[Run]:
    """One run of each: the recipe's, of random draws, and of other arms."""
    drawn = {f"random_{i}": [value] for i, value in enumerate(draws, 1)}
    return runs(norm=[ours], **drawn, **{arm: [value] for arm, value in others.items()})


# ---- a choice beside random ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "draws", "lower", "kind"),
    [
        (2.00, DRAWS, True, "better"),  # margin: 4.303 · 0.01 · sqrt(4/3) = 0.0497
        (2.065, DRAWS, True, "no difference"),  # beyond every draw, and still within chance
        (2.11, DRAWS, True, "no difference"),
        (2.17, DRAWS, True, "worse"),
        (0.50, [0.40, 0.41, 0.42], False, "better"),
        (0.30, [0.40, 0.41, 0.42], False, "worse"),
        (0.43, [0.40, 0.41, 0.42], False, "no difference"),
        (2.0, [2.1, 2.1, 2.1], True, "unknown"),
        (2.0, [2.1], True, "unknown"),
        (2.0, [], True, "unknown"),
        (float("nan"), DRAWS, True, "unknown"),
        (2.0, [2.1, float("inf"), 2.2], True, "unknown"),
    ],
)
def test_the_verdict_does_not_overclaim(ours: float, draws: list[float], lower: bool, kind: str) -> None:
    verdict = judge(chosen(ours, draws), lower, "loss")
    assert verdict.kind == kind
    start = {"better": "Better than random here", "worse": "Random was better", "no difference": "No difference shown"}
    assert verdict.sentence.startswith(start.get(kind, "Nothing can be said"))


def test_the_interval_holds_what_it_says() -> None:
    """With one more random draw in the recipe's place, 19 in 20 verdicts are "no difference", of one seed and of two."""
    generator = torch.Generator().manual_seed(0)
    trials, wrong, apart = 4000, 0, 0
    for place, values in enumerate(torch.randn(trials, 4, 2, generator=generator, dtype=torch.float64).tolist()):
        wrong += judge(chosen(values[0][0], [v[0] for v in values[1:]]), True, "loss").kind != "no difference"
        if place % 4 == 0:
            several = runs(norm=values[0], random_1=values[1], random_2=values[2], random_3=values[3])
            kind, ours = standings(several, lower=True)[1].kind, judge(several, True, "loss", Basis(2)).kind
            assert kind == {"better": "worse", "worse": "better"}.get(ours, ours), (
                "of the draws, and of the recipe's arm"
            )
            apart += kind != "no difference"
    assert 0.04 < wrong / trials < 0.06 and 0.03 < apart / (trials / 4) < 0.07


def test_of_one_seed_no_arm_is_said_to_be_better_or_worse() -> None:
    """However far apart they are: there is nothing to measure chance by, and the words say so; every arm is in them."""
    for last, every in ((1.0, 9.0), (2.0, 2.0), (9.0, 1.0)):
        said = judge(chosen(2.0, DRAWS, last=last, all=every), True, "loss", Basis(1, 1000)).sentence
        assert "clear" not in said and f"last {last:.4f}" in said and f"all {every:.4f}" in said
        assert "of one training seed there is no interval" in said and "--seeds 3" in said
        assert said.endswith("One training seed over 1,000 held-out rows.")
    said = judge(chosen(2.0, DRAWS, last=1.9, all=2.0, snr=2.2), True, "loss", Basis()).sentence
    assert "last 1.9000 (0.1000 better), all 2.0000 (the same), snr 2.2000 (0.2000 worse)" in said
    assert "(0.1000 worse)" in judge(chosen(2.0, DRAWS, last=1.9), False, "accuracy").sentence
    alone = judge(chosen(2.0, [], last=1.9), True, "loss")
    assert alone.kind == "unknown" and "last 1.9000 (0.1000 better): of one training seed" in alone.sentence


GOOD = {"own": [2.0, 3.0, 4.0], "good": [1.9, 2.91, 3.89]}


@pytest.mark.parametrize(("rows", "few"), [(7, True), (99, True), (100, False), (5000, False), (None, False)])
def test_few_held_out_rows_are_named_as_the_limit(rows: int | None, few: bool) -> None:
    words = "too few to say much of others"
    better = judge(chosen(2.0, DRAWS), True, "loss", Basis(1, rows)).sentence
    arms = judge_arms(standings(runs(**GOOD), True), Basis(3, rows)).sentence
    for said in (better, arms):
        assert (words in said) == few and ("held-out row" in said) == (rows is not None)
        assert (" here" in said.partition(":")[0].partition("(")[0]) == (not few)
    if rows == 7:
        assert better.startswith("Better than random on these 7 held-out rows: ")
        assert arms.startswith("good did better than own on these 7 held-out rows (")


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_so_few_rows_judge_nothing_whatever_the_seeds(rows: int) -> None:
    """Of six rows t(5) · sd / sqrt(6) is 1.05 sd: their mean says less of others than one row does."""
    basis = Basis(3, rows)
    stand = standings(runs(**GOOD), True, basis.scant)
    for verdict in (judge(chosen(2.0, DRAWS), True, "loss", basis), judge_arms(stand, basis)):
        assert verdict.kind == "unknown" and verdict.sentence.startswith("Nothing can be said about the ")
        assert verdict.sentence.endswith("too few to judge by.") and "held-out row" in verdict.sentence
    assert stand[1].kind == "unknown" and stand[1].gain is not None
    assert 2.571 / 6**0.5 > 1 > 2.447 / 7**0.5


def test_rows_that_train_as_well_are_no_held_out_rows() -> None:
    basis = Basis(3, 500, trained=20)
    assert str(basis) == "3 seeds over 500 held-out rows, 20 of which train as well."
    assert str(Basis(3, 500, trained=1)) == "3 seeds over 500 held-out rows, 1 of which trains as well."
    said = judge(chosen(2.0, DRAWS), True, "loss", basis).sentence
    assert said.startswith("Better than random on these 500 held-out rows: ")


@pytest.mark.parametrize("trainer", ["sft", "classification", "dpo"])
def test_held_out_rows_are_looked_for_among_those_that_train(trainer: str, tmp_path: Path) -> None:
    rows = {
        "sft": [{"text": f"number {i}"} for i in range(6)],
        "classification": [{"text": f"number {i}", "label": "ab"[i % 2]} for i in range(6)],
        "dpo": [{"prompt": f"number {i}", "chosen": " yes", "rejected": " no"} for i in range(6)],
    }[trainer]
    for name, part in (("train", rows[:4]), ("held", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    text = f"trainer: {trainer}\nmodel_name_or_path: {short_llama(3)}\ndataset_name: train.jsonl\neval_dataset: held.jsonl\n"
    (tmp_path / "r.yaml").write_text(f"{text}output_dir: out\nlayerpeft: {{method: lora, select: last:1}}\n")
    setup = tokenized(prepare(load_recipe(str(tmp_path / "r.yaml"), ["bf16=false"], "compare")))
    assert trained_on(setup) == 1
    pictures = Dataset.from_dict({"pixel_values": [[[0.5, 1.5]]]})
    assert trained_on(replace(setup, train=pictures, held_out=pictures)) is None


def test_small_numbers_are_shown_as_they_are() -> None:
    said = judge(chosen(2e-5, [3e-5, 3.1e-5, 3.2e-5], last=2.5e-5), True, "loss").sentence
    assert "reached a loss of 2e-05" in said and "last 2.5e-05 (5e-06 worse)" in said


def test_other_numbers_than_losses_are_named_behind_them() -> None:
    said = judge(chosen(0.9, [0.5, 0.6, 0.7]), False, "accuracy").sentence
    assert "reached 0.9000 (accuracy) and 3 random draws 0.6000 on average" in said


def test_rates_that_were_chosen_on_the_rows_are_named() -> None:
    assert str(Basis(3, 200, tuned=True)) == "3 seeds over 200 held-out rows that rates were chosen by as well."


# ---- arms, paired by seed -------------------------------------------------------------------------------------------


def test_arms_are_paired_by_seed() -> None:
    """Seeds that differ far more than arms hide nothing, since each is compared with the same one."""
    same = runs(own=[2.0, 3.0, 4.0], better=[1.9, 2.91, 3.89], noise=[1.9, 3.2, 3.9], worse=[2.1, 3.11, 4.09])
    found = standings(same, lower=True)
    assert [s.kind for s in found] == ["", "better", "no difference", "worse"]
    gain = found[1].gain
    assert gain is not None and gain.mean == pytest.approx(0.1)
    assert gain.margin == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert interval([2.0, 3.0, 4.0]).margin == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    verdict = judge_arms(found, THREE)
    assert verdict.kind == "worse" and verdict.sentence.startswith("better did better than own here")
    assert "noise 3.0000, not told apart from chance" in verdict.sentence and "of twenty" in verdict.sentence
    assert [s.kind for s in standings(same, lower=False)] == ["", "worse", "no difference", "better"]
    assert judge_arms([found[0], found[3]], THREE).kind == "better"
    none = judge_arms([found[0], found[2]], THREE)
    assert none.kind == "no difference" and none.sentence.startswith("No arm is shown to be better than own by 3 seeds")


def test_what_one_seed_or_a_run_that_failed_shows_is_nothing() -> None:
    one = standings(runs(own=[2.0], other=[1.0]), lower=True)
    verdict = judge_arms(one, Basis(1, 2))
    assert one[1].kind == "unknown" and verdict.kind == "unknown"
    assert "other 1.0000 (1.0000 better); of one training seed there is no interval" in verdict.sentence
    assert verdict.sentence.endswith("over 2 held-out rows, too few to judge by.")
    lost = standings(runs(own=[2.0, 2.1, 2.2], other=[1.0, float("nan"), 1.2]), lower=True)
    verdict = judge_arms(lost, THREE)
    assert lost[1].kind == "unknown" == verdict.kind and "nothing can be said" in verdict.sentence
    assert judge_arms(lost[:1], THREE) == Verdict(
        "unknown", "Nothing can be said about the arms: none is left beside own."
    )


def test_the_same_numbers_are_no_difference_and_the_same_gap_has_no_spread() -> None:
    """As of few rows by accuracy: three times the same step up is no interval of length nought."""
    same, gap = standings(runs(own=[2.0, 2.5], same=[2.0, 2.5], gap=[1.5, 2.0]), lower=True)[1:]
    assert (same.kind, gap.kind) == ("no difference", "unknown")
    said = judge_arms(
        standings(runs(own=[2.0, 2.5], same=[2.0, 2.5], gap=[1.5, 2.0]), lower=True), Basis(2, 9)
    ).sentence
    assert "same 2.2500, the same under every seed" in said and "(the same difference of 0.5000 in each)" in said


def test_draws_are_the_units_of_random_layers() -> None:
    """Another draw would give other layers: the margin is that of one more draw, as in the verdict on the choice."""
    drawn = runs(own=[2.0, 4.0], random_1=[2.1, 4.1], random_2=[2.2, 4.2], random_3=[2.3, 4.3])
    found = standings(drawn, lower=True)
    assert [s.arm for s in found] == ["own", "random"] and found[1].runs == 6
    gain = found[1].gain
    assert gain is not None and gain.mean == pytest.approx(-0.2)
    assert gain.margin == pytest.approx(4.303 * 0.1 * (4 / 3) ** 0.5, rel=1e-3)
    assert found[1].kind == "no difference" == judge(drawn, True, "loss", Basis(2)).kind
    assert "random (3 draws) 3.2000" in judge_arms(found, Basis(2)).sentence
    one = standings(runs(own=[2.0, 4.0], random_1=[2.1, 4.1001]), lower=True)
    assert "random (one draw) 3.1001, worse" in judge_arms(one, Basis(2)).sentence


def test_an_interval_of_pairs_holds_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    trials, wrong = 1500, 0
    for luck in torch.randn(trials, 3, generator=generator, dtype=torch.float64) * 5:
        own, other = (torch.randn(3, generator=generator, dtype=torch.float64) + luck for _ in range(2))
        wrong += standings(runs(own=own.tolist(), other=other.tolist()), lower=True)[1].kind != "no difference"
    assert 0.035 < wrong / trials < 0.065


# ---- table and picture ----------------------------------------------------------------------------------------------


def test_draws_and_layers_are_named_apart() -> None:
    """`random:3` asks for three draws, `last:3` for three layers: no line reads as the one and means the other."""
    found = runs(norm=[2.0], random_1=[2.1], random_2=[2.2], random_3=[2.3], last_3=[2.4])
    shown = Comparison("eval_loss", 3.0, tuple(found), judge(found, True, "loss"), 12)
    lines = table(shown).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:]] == [
        "norm", "random, draw 1", "random, draw 2", "random, draw 3", "last:3", "random, mean",
    ]  # fmt: skip
    assert labels(shown) == ["norm\n0", "random\n3 draws of 1 layer", "last:3\n0"]
    one = replace(shown, runs=tuple(run for run in found if run.arm in ("norm", "random:2")))
    assert labels(one) == ["norm\n0", "random\none draw: 0"]
