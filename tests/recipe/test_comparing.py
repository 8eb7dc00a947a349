"""`layerpeft compare` with other methods as arms: at an equal budget, over seeds, interrupted, and what its numbers show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import LayerpeftError, RecipeError
from layerpeft.recipe import compare as comparing
from layerpeft.recipe.comparing.arms import Arm, arm_recipes, arms_beside, parse_arms
from layerpeft.recipe.comparing.budgets import (
    Budget,
    Counter,
    Left,
    at_rank,
    fitted,
    given,
    largest,
    parse_budget,
    room_of,
)
from layerpeft.recipe.comparing.entries import Entry, entries_of
from layerpeft.recipe.comparing.rates import parse_rates
from layerpeft.recipe.comparing.runs import Kept, Run, key_of
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import Setup, load_model, prepare
from tests.helpers.short import short_llama

WORDS = [
    f"model_name_or_path={short_llama(3)}", "max_steps=2", "max_train_samples=8", "max_eval_samples=2", "max_length=32",
    "per_device_train_batch_size=2", "warmup_steps=0", 'columns={text: "{answer}"}', "output_dir=out",
    "layerpeft.select=last:1", "layerpeft.r=4", "layerpeft.lora_alpha=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("setup"))
        return prepare(load_recipe("quickstart", WORDS, "compare"))


@pytest.fixture(scope="module")
def entries(setup: Setup) -> dict[str, Entry]:
    arms = parse_arms("last,last:2,last:1,snr,random:2,lora,galore,lisa,full,all")
    found = entries_of(setup, load_model(setup), arms, arm_recipes(setup.recipe, arms))
    return {("own" if index == 0 else entry.arm): entry for index, entry in enumerate(found)}


@pytest.fixture(scope="module")
def counter(setup: Setup) -> Counter:
    return Counter(setup)


# ---- arms -----------------------------------------------------------------------------------------------------------


def test_every_problem_of_the_arms_is_told_at_once_before_weights_load(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "load_model", lambda *_: pytest.fail("weights were loaded"))
    assert main(["compare", "quickstart", *WORDS, "--arms", "lissa,gradient_nrom,no.yaml,owlore:2"]) == 2
    said = capsys.readouterr().err
    assert "4 problems" in said and "'lisa'" in said and "'gradient_norm'" in said
    assert "no recipe file 'no.yaml'" in said and "owlore takes no number" in said
    (place / "other.yaml").write_text(
        "learning_rate: fast\nlayerpeft: {method: lora, selct: all, target_modules: [q_prj]}\n"
    )
    assert main(["compare", "quickstart", *WORDS, "--arms", "other.yaml,finercut,change,ist"]) == 2
    said = capsys.readouterr().err
    assert (
        "5 problems" in said and "other: learning_rate: expected a number" in said and "Did you mean 'select'?" in said
    )
    assert "finercut: drop: takes layers out of the model" in said and "change: " in said and "ist: " not in said


def test_a_run_is_known_by_what_its_model_holds_and_not_by_where_it_lies(setup: Setup, place: Path) -> None:
    copies = [Path(shutil.copytree(short_llama(), place / name)) for name in ("one", "two", "other")]
    weights = copies[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    entry = entries_of(setup, load_model(setup), [], {})[0]
    keys = []
    for copy in copies:
        values = {**entry.recipe.values, "model_name_or_path": str(copy)}
        keys.append(key_of(replace(entry, recipe=replace(entry.recipe, values=values)), setup))
    assert keys[0] == keys[1] != keys[2]


def test_an_arm_is_called_as_its_file_or_the_folder_of_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first/recipe.yaml", "second/recipe.yaml", "random:7.yaml"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("trainer: dpo\nlayerpeft: {method: lora, select: last:1}\n")
    arms = parse_arms("first/recipe.yaml,second/recipe.yaml")
    assert [arm.name for arm in arms] == ["first", "second"]
    for name, why in (
        ("random:7", "a colon stands for draws"),
        ("recipe/recipe", "'recipe' is the recipe that is compared"),
    ):
        (place / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (place / f"{name}.yaml").touch()
        with pytest.raises(LayerpeftError, match=why):
            parse_arms(f"{name}.yaml")


def test_an_arm_takes_how_another_recipe_trains_and_nothing_else(setup: Setup, place: Path) -> None:
    model = load_model(setup)
    (place / "mine").mkdir()
    replace(layerpeft.score_layers(model, by="snr"), values=(0.0, 1.0, 0.0)).save(place / "mine" / "own.json")
    (place / "mine" / "other.yaml").write_text(
        "model_name_or_path: nowhere/else\nmax_steps: 900\nlr: 7.0e-4\nweight_decay: 0.1\n"
        "layerpeft: {method: full, select: {by: ./own.json, keep: 1}}\n"
    )
    arms = parse_arms("mine/other.yaml,lisa")
    found = arm_recipes(setup.recipe, arms)
    own, lisa = found["other"], found["lisa"]
    assert (own.method, own["learning_rate"], own["weight_decay"], own["max_steps"]) == ("full", 7e-4, 0.1, 2)
    assert own["model_name_or_path"] == setup.recipe["model_name_or_path"]
    assert lisa["learning_rate"] == 1e-3 and lisa["warmup_steps"] == 0 and lisa.config.is_scheduled
    entry = entries_of(setup, model, parse_arms("mine/other.yaml"), found)[1]
    assert entry.layers == (1,) and entry.recipe.method == "full"


def test_arms_are_what_they_say(entries: dict[str, Entry]) -> None:
    assert entries["own"].arm == "recipe"  # since an arm is called as its choice is
    assert entries["own"].layers == entries["last"].layers == entries["last:1"].layers == (2,)
    assert entries["last:2"].layers == (1, 2) and entries["last:2"].again is None
    assert entries["lora"].layers == entries["all"].layers == (0, 1, 2)
    assert entries["lisa"].count == 2 and entries["lisa"].select["reselect_steps"] == 20
    assert len({entries[f"random:{i}"].layers for i in (1, 2)} | {(9,)}) == 3
    assert entries["lora"].recipe["learning_rate"] == 5e-3 and entries["full"].recipe["learning_rate"] == 1e-3


def test_what_no_arm_can_choose_is_told_for_all_of_them_by_their_names(setup: Setup) -> None:
    arms = parse_arms("last:9,random:30,snr:4,last")
    with pytest.raises(RecipeError, match="3 problems") as told:
        entries_of(setup, load_model(setup), arms, {arm.name: setup.recipe for arm in arms})
    said = str(told.value)
    assert "last:9: keep: 9 layers are asked for, and there are 3 to choose from" in said and "snr:4: keep: 4" in said
    assert "random: there are only 3 different choices of 1 layer, not 30" in said


def test_a_choice_is_set_beside_what_it_is_not_and_no_more_draws_than_there_are() -> None:
    assert arms_beside((1, 3), range(5)) == "random:3,last,all" == arms_beside((1,), None)
    assert arms_beside((4, 3), range(5)) == "random:3,all" and arms_beside((0,), (0, 2)) == "random:2,last,all"
    assert arms_beside(range(5), range(5)) == ""


# ---- budgets --------------------------------------------------------------------------------------------------------


SIZES = [lambda n: 3 * n + 7, lambda n: n * n, lambda n: max(50, 9 * n), lambda n: 2 ** min(n, 40)]


@pytest.mark.parametrize("room", [7, 60, 333, 4000])
@pytest.mark.parametrize("size", SIZES)
def test_the_largest_number_within_a_room_is_found_in_few_looks(size: Callable[[int], float], room: int) -> None:
    exact = max((n for n in range(1, 200) if size(n) <= room), default=None)
    looks: list[int] = []
    found = largest(lambda n: (looks.append(n), size(n))[1], 1, 199, room)  # type: ignore[func-returns-value]
    assert found == exact or found is not None and 0.995 * room <= size(found) <= room
    assert len(looks) < 20


@pytest.mark.parametrize(("kind", "arms"), [("memory", ["last", "full"]), ("parameters", ["last:2", "galore", "full"])])
def test_arms_take_as_much_as_the_budget_holds(
    kind: str, arms: list[str], counter: Counter, entries: dict[str, Entry]
) -> None:
    budget = Budget(kind)
    room = 1.1 * {"memory": lambda e: counter.cost(e).peak_bytes, "parameters": counter.trainable}[kind](entries["all"])
    for name in arms:
        one = fitted(entries[name], counter, budget, room)
        if isinstance(one, Left):  # a whole layer
            assert (name, kind) == ("full", "parameters") and one.why.startswith(
                "one layer, with what trains besides, is"
            )
            continue
        took = given(one, counter, budget, room)
        assert took.share is not None and 0.3 < took.share <= 1, (name, took)
        if took.rank is not None:
            assert took.rank > 4
            more = replace(one, recipe=at_rank(one.recipe, int(took.rank * 1.1) + 1))
            assert (counter.cost(more).peak_bytes if kind == "memory" else counter.trainable(more)) > room
    if kind == "memory":
        last = fitted(entries["last"], counter, budget, room)
        assert isinstance(last, Entry) and last.count == 3  # as many as the memory holds
    lisa = fitted(entries["lisa"], counter, budget, room_of(entries["own"], counter, budget))
    assert isinstance(lisa, Left) and "and the budget is" in lisa.why


def test_an_equal_time_is_more_steps_where_a_step_takes_less(counter: Counter, entries: dict[str, Entry]) -> None:
    budget = Budget("time", 10**11)
    room = room_of(entries["own"], counter, budget)
    warm = {
        k: replace(e, recipe=replace(e.recipe, values={**e.recipe.values, "warmup_steps": 1}))
        for k, e in entries.items()
    }
    last, lora = (fitted(warm[name], counter, budget, room) for name in ("last", "lora"))
    assert isinstance(last, Entry) and isinstance(lora, Entry)
    assert last.recipe["max_steps"] == int(1e11 / counter.cost(last).flops) > lora.recipe["max_steps"] > 2
    assert last.recipe["warmup_steps"] == round(last.recipe["max_steps"] / 2)
    assert 0.9 < (given(lora, counter, budget, room).share or 0) <= 1
    assert isinstance(fitted(warm["lora"], counter, Budget("time", 100), 100.0), Left)


def test_a_lower_rank_keeps_the_scale_and_a_higher_one_alpha(setup: Setup) -> None:
    low, high = (at_rank(setup.recipe, rank) for rank in (2, 16))
    assert (low.config.r, low.config.lora_alpha, high.config.r, high.config.lora_alpha) == (2, 4, 16, 8)
    assert low.block["r"] == 2 and low.block["lora_alpha"] == 4 and high.block["r"] == 16


def test_budgets_and_rates_are_read() -> None:
    assert parse_budget("memory") == Budget("memory") and parse_budget("memory=2KiB") == Budget("memory", 2048)
    assert parse_budget("parameters=2M") == Budget("parameters", 2_000_000)
    assert parse_budget("time=1.5e3") == Budget("time", 1500)
    for text in ("memry", "memory=lots", "time=0", "parameters="):
        with pytest.raises(RecipeError, match="--budget"):
            parse_budget(text)
    rates = parse_rates(["x0.5,x2", "lisa=1e-4", "recipe=0.1"], ["lisa", "random"])
    assert rates.of("random", 0.01) == (0.005, 0.02) and rates.of("lisa", 1.0) == (1e-4,)
    assert rates.of("recipe", 1.0) == (0.1,) and rates.tried and not parse_rates([], []).tried
    with pytest.raises(RecipeError, match="3 problems") as told:
        parse_rates(["fast,-1", "lissa=1e-3"], ["lisa"])
    assert "Did you mean 'lisa'" in str(told.value)
    for text in ("1e400", "x1e400", "lisa=1e-400", "0", "nan", "inf", "x0", "2e6"):
        with pytest.raises(RecipeError, match="is no learning rate above 0"):
            parse_rates([text], ["lisa"])


# ---- whole ----------------------------------------------------------------------------------------------------------


def test_a_comparison_that_was_interrupted_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two arms, two seeds, a rate that is tried: what was trained is not trained again, and all comes out as one."""
    trained: list[str] = []
    real = comparing._train

    def counted(setup: Setup, entry: Entry, trainer: object, model: object) -> Run:
        if len(trained) == 3:
            trained.append("")
            raise KeyboardInterrupt
        trained.append(entry.arm)
        return real(setup, entry, trainer, model)

    monkeypatch.setattr(comparing, "_train", counted)
    words = ["compare", "quickstart", *WORDS, "--arms", "lisa", "--seeds", "2", "--rates", "lisa=1e-3", "--json"]
    assert main(words) == 130
    assert "interrupted: 3 runs are in out/compare.jsonl; the same command goes on" in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (
        trained == ["lisa", "last:1", "lisa", "", "last:1", "lisa"] and "2 of them are in out/compare.jsonl" in said.err
    )
    assert [(r["arm"], r["seed"]) for r in found["runs"]] == [("last:1", 0), ("lisa", 0), ("last:1", 1), ("lisa", 1)]
    assert len({r["value"] for r in found["runs"]}) == 4 and found["before"] > 0
    assert found["given"]["lisa"]["rate"] == 1e-3 and found["given"]["last:1"]["rank"] == 4
    assert [s["arm"] for s in found["standings"]] == ["last:1", "lisa"]
    assert len((place / "out" / "compare.jsonl").read_text().splitlines()) == 5
    again = Kept(place / "out" / "compare.jsonl")
    (place / "out" / "compare.jsonl").write_text((place / "out" / "compare.jsonl").read_text().replace("lisa", "lora"))
    assert again.lines and main(words) == 2
    assert "did not write, or what was changed since" in capsys.readouterr().err


@pytest.mark.slow  # arms and budgets are tested one by one above
@pytest.mark.pictures
@pytest.mark.parametrize("budget", ["memory=60MiB", "parameters=1.8M", "time"])
def test_methods_at_an_equal_budget(budget: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = "lora,galore,lisa,owlore,badam,grass,full,last,random:2"
    assert (
        main(["compare", "quickstart", *WORDS, "max_steps=4", "--arms", arms, "--seeds", "2", "--budget", budget]) == 0
    )
    said = capsys.readouterr().out
    found = json.loads((place / "out" / "compare.json").read_text())
    assert {s["arm"] for s in found["standings"]} | {one["arm"] for one in found["left_out"]} == {
        "last:1", "lora", "galore", "lisa", "owlore", "badam", "grass", "full", "last", "random",
    }  # fmt: skip
    assert all(took["share"] <= 1.0001 for took in found["given"].values())
    assert (place / "out" / "compare.png").read_bytes().startswith(b"\x89PNG") and "of budget" in said


def test_arm_names_are_unlike() -> None:
    assert [arm.name for arm in parse_arms("last,last:2,random:2")] == ["last", "last:2", "random"]
    assert Arm("last", keep=2).name == "last:2"
