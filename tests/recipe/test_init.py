"""`layerpeft init`: what it writes plans and trains as it is; what is wrong is said at once, and nothing is left."""

import builtins
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MambaConfig

from layerpeft.cli import main
from layerpeft.recipe import commands, init
from layerpeft.recipe.init import Wanted, guess
from layerpeft.recipe.pace import Pace, pace
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.shipped import resolve

pytestmark = pytest.mark.usefixtures("shallow")

ALPACA = [{"instruction": f"Say {n}.", "input": "", "output": f"number {n} ✓"} for n in range(30)]
LLAMA = ["--model", "layerpeft://llama-6m"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    return tmp_path


def test_the_recipe_plans_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *LLAMA, "--data", "rows.jsonl", "--fit", "24GB", "learning_rate=1e-3", "--out", "r.yaml"]) == 0
    assert "layerpeft train r.yaml" in capsys.readouterr().out
    text = Path("r.yaml").read_text()
    assert "# 30 rows, read as Alpaca rows" in text and "# measured on the rows; fits into 22.4 GiB as it is" in text
    assert "# 19 of 20 rows have at most" in text and "\\u" not in text
    recipe = load_recipe("r.yaml", purpose="plan")
    assert (recipe.trainer, recipe["eval_dataset"], recipe["max_length"]) == ("sft", "10%", 64)
    assert (recipe["num_train_epochs"], recipe["per_device_train_batch_size"]) == (
        8,
        2,
    ) and "# 112 steps of 2 rows" in text
    assert recipe["learning_rate"] == 1e-3 and recipe.select == {
        "by": "gradient_norm",
        "keep": {"time": "75%", "length": 64},
    }
    assert recipe["gradient_checkpointing"] is False  # 30 rows of 64 tokens fit without
    assert main(["plan", "r.yaml"]) == 0
    assert main(["init", *LLAMA, "--data", "rows.jsonl", "--out", "r.yaml"]) == 2  # nothing is written over
    assert "r.yaml exists already" in capsys.readouterr().err and Path("r.yaml").read_text() == text


@pytest.mark.slow
def test_what_does_not_fit_is_made_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *LLAMA, "--data", "rows.jsonl", "--fit", "45MB"]) == 0
    text = Path("recipe.yaml").read_text()
    assert "and gives up:" in text
    assert main(["plan", "recipe.yaml", "--fit", "45MB"]) == 0
    assert "fits as it is" in capsys.readouterr().out
    assert main(["init", *LLAMA, "--data", "rows.jsonl", "--fit", "1MB", "--out", "small.yaml"]) == 2
    assert "nothing fits into" in capsys.readouterr().err and not Path("small.yaml").exists()


def test_everything_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "gone.jsonl", "--task", "dop", "--fit", "much", "--out", "no/r.yaml"]
    assert main(["init", *words]) == 2
    said = capsys.readouterr().err
    for fragment in (
        "--model: missing",
        "no file 'gone.jsonl'",
        "'dop'",
        "Did you mean 'dpo'",
        "'much' is no size",
        "no folder 'no'",
    ):
        assert fragment in said
    assert main(["init", *LLAMA, "--data", "rows.jsonl", "--task", "grpo"]) == 2
    assert "rewards: missing" in capsys.readouterr().err
    assert main(["init", *LLAMA, "--data", "rows.jsonl", "--task", "dpo"]) == 2
    assert "Alpaca rows, which trainer: sft" in capsys.readouterr().err and not Path("recipe.yaml").exists()
    assert main(["init", "--modle", "x"]) == 2 and "'--model'" in capsys.readouterr().err


def test_the_rows_tell_the_task() -> None:
    told = {
        ("messages",): "sft", ("instruction", "input", "output"): "sft", ("text",): "sft", ("text", "label"): "classification",
        ("prompt", "chosen", "rejected"): "dpo", ("chosen", "rejected"): "dpo", ("prompt", "completion", "label"): "kto",
        ("tokens", "tags"): "token_classification", ("image", "label"): "image_classification", ("a", "b"): None,
        ("prompt", "completion"): "sft",
    }  # fmt: skip
    assert {columns: guess(columns) for columns in told} == told


def test_in_a_terminal_it_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers, asked = iter(["layerpeft://llama-6m", "rows.jsonl", "", "10%", "mine.yaml"]), []

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(builtins, "input", answer)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    given: list[Any] = []
    monkeypatch.setattr(commands, "write_recipe", lambda wanted: (Path("mine.yaml"), given.append(wanted)))
    assert main(["init", "--fit", "24GB"]) == 0
    assert [q.partition(" ")[0] for q in asked] == ["Model", "Rows", "Task", "Held-out", "Recipe"]
    assert "[sft]" in asked[2]
    assert given == [Wanted("layerpeft://llama-6m", "rows.jsonl", "sft", "10%", "mine.yaml", "24GB")]
    given.clear()
    monkeypatch.setattr(builtins, "input", lambda question: "")
    assert main(["init", "--data", "rows.jsonl", *LLAMA]) == 0 and given[0].task == "sft"


def at_terminal(monkeypatch: pytest.MonkeyPatch, *told: str) -> tuple[list[str], list[Any]]:
    """Answers that are left to give, and the recipes that were to be written."""
    answers, given = list(told), list[Any]()

    def answer(question: str) -> str:
        if not answers:
            raise EOFError
        return answers.pop(0)

    monkeypatch.setattr(builtins, "input", answer)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(commands, "write_recipe", lambda wanted: (Path("mine.yaml"), given.append(wanted)))
    return answers, given


def test_a_wrong_answer_is_asked_for_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipe.yaml").touch()
    told = ["", "./lama", "layerpeft://llama-6m", "rowz.jsonl", "rows.jsonl", "dop", "grpo", "dpo", "sft"]
    told += ["200%", "gone.jsonl", "none", "recipe.yaml", "gone/r.yaml", ""]
    answers, given = at_terminal(monkeypatch, *told)
    assert main(["init", "--fit", "24GB"]) == 0 and not answers
    said = " ".join(capsys.readouterr().out.split())
    wrong = [
        "an answer is needed", "no folder './lama'", "no file 'rowz.jsonl'", "Did you mean 'rows.jsonl'?", "unknown task 'dop'",
        "rewards: missing; grpo needs it", "they are Alpaca rows, which trainer: sft", "'200%' leaves no rows on one side",
        "no file 'gone.jsonl'", "recipe.yaml exists already", "no folder 'gone'",
    ]  # fmt: skip
    places = [said.find(fragment) for fragment in wrong]
    assert -1 not in places and places == sorted(places)
    assert given == [Wanted("layerpeft://llama-6m", "rows.jsonl", "sft", "none", "recipe-2.yaml", "24GB")]


def test_what_was_said_is_judged_before_the_first_question(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, given = at_terminal(monkeypatch, "unasked")
    assert main(["init", "--model", "./lama", "--fit", "24", "--held-out", "0%"]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said and "--fit: '24' has no unit; write 24GiB" in said and answers == ["unasked"]
    answers.clear()
    assert main(["init", *LLAMA]) == 2 and "no answer to: Rows" in capsys.readouterr().err and given == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Question,Answer\na,b\n", 'columns=\'{prompt: "{Question}\\n", completion: "{Answer}"}\''),
        ("prompt;completion\na;b\n", "one column, with ';' in its name: a .csv has commas between its cells"),
        ("what\na\n", "columns='{text: \"{what}\"}'"),
    ],
)
def test_rows_that_nothing_reads_say_what_is_what(
    text: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("d.csv").write_text(text)
    assert main(["init", *LLAMA, "--data", "d.csv"]) == 2
    said = capsys.readouterr().err
    assert says in said and "there is nobody to ask" not in said and "--task" not in said
    if "columns=" in says:  # as it is printed
        setting = shlex.split(said.rpartition("as in ")[2])[0]
        assert guess(list(init.flags(Wanted(settings=(setting,)), where=False)["columns"])) == "sft"
    at_terminal(monkeypatch, "sft")
    assert main(["init", *LLAMA, "--data", "d.csv"]) == 2 and says in " ".join(capsys.readouterr().err.split())


def test_rows_without_columns_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bare.jsonl").write_text("{}\n" * 3)
    assert main(["init", *LLAMA, "--data", "bare.jsonl"]) == 2
    assert capsys.readouterr().err.endswith("`text` and `label`, and have no columns\n")


def test_most_rows_fit_where_one_is_long() -> None:
    long = [{"prompt": f"q {n}", "completion": "word " * (3000 if n == 4 else 3)} for n in range(25)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    Path("r.yaml").write_text(
        "trainer: sft\nmodel_name_or_path: layerpeft://llama-6m\ndataset_name: long.jsonl\noutput_dir: out\n"
        "layerpeft: {select: last:1}\n"
    )
    limit, said = init._length(load_recipe("r.yaml", ["max_train_samples=200"], "plan"))
    assert limit == 64 and "the longest 3" in said


@pytest.mark.parametrize(
    ("rows", "width", "alone", "found"),
    [
        (1, 256, True, Pace(20, 1, 2e-3, 20)),
        (38, 256, True, Pace(10, 4, 2e-3, 100)),
        (38, 4096, True, Pace(10, 4, 3e-4, 100)),
        (38, None, False, Pace(10, 4, 5e-5, 100)),
        (300, 2000, True, Pace(3, 8, 5e-4, 114)),
        (10**6, 2000, True, Pace(3, 8, 5e-4, 375_000)),
    ],
)
def test_few_rows_come_more_often_and_fewer_at_a_time(rows: int, width: int | None, alone: bool, found: Pace) -> None:
    assert pace(rows, width, alone) == found
    assert 1 <= found.logging <= 10 and found.steps / found.logging >= 10


def test_where_no_layer_takes_so_little_or_nobody_counts_it_a_share_of_the_layers_trains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    narrow = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096
    )
    for place, config in (
        ("narrow", narrow),
        ("strange", MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=4096)),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
        AutoTokenizer.from_pretrained(resolve("layerpeft://llama-6m")).save_pretrained(place)
        words = ["--model", place, "--data", "rows.jsonl", "--fit", "24GB", "--out", f"{place}.yaml", "max_length=16"]
        assert main(["init", *words]) == 0
        assert capsys.readouterr().err.count("reading the rows") == 1
        assert load_recipe(f"{place}.yaml", purpose="plan").select == {"by": "gradient_norm", "keep": "50%"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo", "classification"])
def test_the_recipe_trains(task: str) -> None:
    made: dict[str, Any] = {
        "sft": ALPACA,
        "dpo": [{"prompt": f"q {n}", "chosen": " good", "rejected": " bad"} for n in range(24)],
        "classification": [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(24)],
    }
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made[task]))
    assert main(["init", *LLAMA, "--data", "d.jsonl", "--fit", "24GB"]) == 0
    assert load_recipe("recipe.yaml").trainer == task
    assert main(["train", "recipe.yaml", *([] if task == "sft" else ["max_steps=2"])]) == 0
    assert (Path("outputs/recipe") / "adapter_model.safetensors").is_file()
    found = json.loads(Path("outputs/recipe/run.json").read_text())
    if task == "sft":  # a small file is learned
        assert found["after"]["eval_loss"] < found["before"]["eval_loss"] / 2
