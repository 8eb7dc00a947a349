"""Data as people have it: forms by their columns, several data sets by weight, a share held out, folders of `save_to_disk`."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from layerpeft.errors import RecipeError
from layerpeft.recipe import gathered
from layerpeft.recipe.gathered import mixed
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.rows import broken_lines
from layerpeft.recipe.sources import Named
from layerpeft.recipe.trainer import prepare, tokenized

pytestmark = pytest.mark.usefixtures("shallow")

RECIPE = """\
trainer: {trainer}
model_name_or_path: layerpeft://llama-6m
dataset_name: {rows}
output_dir: out
layerpeft: {{method: lora, select: last:2, r: 4}}
max_length: 64
"""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Grüß dich ✓", "text": None},
    {"instruction": "Go on.", "input": None, "output": "c", "system": "Short.", "history": [["a", "b"]]},
]
PAIR = {"chosen": "good", "rejected": "bad"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("t.jinja").write_text(TEMPLATE)
    return tmp_path


def write(name: str, made: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return name


def setup_of(rows: Any, more: str = "", trainer: str = "sft") -> Any:
    rows = rows if isinstance(rows, str) else json.dumps(rows)
    Path("r.yaml").write_text(RECIPE.format(rows=rows, trainer=trainer) + more, encoding="utf-8")
    return prepare(load_recipe("r.yaml"))


def numbered(name: str, count: int, start: int = 0) -> str:
    return write(name, [{"text": f"row {n}"} for n in range(start, start + count)])


# ---- forms ----------------------------------------------------------------------------------------------------------


def test_alpaca_rows_are_text_or_turns_as_the_tokenizer_writes_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = write("a.jsonl", [{k: v for k, v in row.items() if k != "text"} for row in ALPACA])
    with monkeypatch.context() as plainly, caplog.at_level("INFO", "layerpeft"):
        plainly.setattr(gathered, "tokenizer", lambda recipe: SimpleNamespace(chat_template=None))
        plain = setup_of(rows).train
    assert "Alpaca rows (instruction and input are the prompt, output is the answer)" in caplog.text
    assert plain["prompt"][:2] == ["Add.\n\n1 2\n\n", "Greet.\n\n"] and plain["completion"][1] == "Grüß dich ✓"
    setup = setup_of(rows, "chat_template_path: t.jinja\n")
    turns = [(turn["role"], turn["content"]) for turn in setup.train[2]["prompt"]]
    assert turns == [("system", "Short."), ("user", "a"), ("assistant", "b"), ("user", "Go on.")]
    made = tokenized(setup).train
    learned = [i for i, label in zip(made[0]["input_ids"], made[0]["labels"]) if label != -100]
    assert setup.tokenizer.decode(made[0]["input_ids"]) == "<user>Add.\n\n1 2<assistant>3"
    assert setup.tokenizer.decode(learned).endswith("3") and len(learned) < len(made[0]["input_ids"])


def test_sharegpt_speakers_are_those_of_chat_templates() -> None:
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    setup = setup_of(write("s.jsonl", [{"conversations": said, "id": 7}]), "chat_template_path: t.jinja\n")
    assert setup.tokenizer.decode(tokenized(setup).train[0]["input_ids"]) == "<system>s<user>q<assistant>a"


def test_every_row_that_is_not_of_the_form_is_named() -> None:
    bad = [{"instruction": "x", "output": None}, {"instruction": " ", "input": None, "output": "y"}]
    history = {"instruction": "x", "output": "y", "history": ["no pair"]}
    with pytest.raises(RecipeError) as refused:
        setup_of(write("a.jsonl", [ALPACA[0], *bad, history]))
    text = str(refused.value)
    assert (
        "line 2: row 2 has no output" in text and "row 3 has no instruction" in text and "row 4 has a history" in text
    )


@pytest.mark.parametrize(
    ("trainer", "row", "fragments"),
    [
        (
            "dpo",
            {"prompt": "q", "completion": "a"},
            ["prompts and completions", "trainer: sft", "`chosen` and `rejected`"],
        ),
        ("sft", {"prompt": "q", **PAIR}, ["preference pairs", "dpo", "have prompt, chosen, rejected"]),
        ("sft", PAIR, ["preference pairs", "reward"]),
        ("dpo", ALPACA[0], ["Alpaca rows", "trainer: sft", "`chosen` and `rejected`"]),
        ("kto", {"messages": []}, ["conversations", "sft", "`label`"]),
    ],
)
def test_rows_of_another_trainer_are_told_what_they_are(trainer: str, row: Any, fragments: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        setup_of(write("d.jsonl", [row, row]), trainer=trainer)
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)


def test_alpaca_instructions_are_prompts_of_pairs() -> None:
    made = setup_of(write("d.jsonl", [{**ALPACA[0], **PAIR}]), trainer="dpo").train
    assert dict(made[0]) == {"prompt": "Add.\n\n1 2\n\n", "chosen": "good", "rejected": "bad"}


# ---- several data sets, a share held out -----------------------------------------------------------------------------


def test_data_sets_come_by_their_weights(caplog: pytest.LogCaptureFixture) -> None:
    a, b = numbered("a.jsonl", 10), write("b.csv.jsonl", [{"text": f"row {n}", "id": n} for n in range(100, 120)])
    sets = [{"path": a, "weight": 2}, {"path": b, "weight": 1}]
    with caplog.at_level("INFO", "layerpeft"):
        setup = setup_of(sets)
    found, told = list(setup.train["text"]), caplog.text
    assert "20 of 30 rows of an epoch, of 10 rows, each 2 times" in told and "of 20 rows, 10 left out" in told
    counts = Counter(found)
    assert set(counts.values()) == {1, 2} and sum(n for text, n in counts.items() if int(text[4:]) < 100) == 20
    assert sum(int(text[4:]) < 100 for text in found[:9]) == 6  # every stretch has its share
    assert found == list(setup_of(sets).train["text"]) != list(setup_of(sets, "seed: 7\n").train["text"])
    for index in (0, 1, 17, 29):  # a row that cannot be read is named at its own place
        place, number = setup.sources[0].place(index), int(found[index][4:])
        assert place.number == number % 100 + 1 and (a if number < 100 else b) in place.where
    assert list(setup_of(sets, "max_train_samples: 5\n").train["text"]) == found[:5]
    assert sorted(setup_of([{"path": a}, b]).train["text"]) == sorted({*counts, *(f"row {n}" for n in range(100, 120))})


def test_an_epoch_is_as_long_as_all_rows() -> None:
    sets = [Named("a", 0.7), Named("b", 0.2), Named("c", 0.1)]
    order = mixed([range(3), range(3, 103), range(103, 1003)], sets, 1)
    counts = [sum(a <= i < b for i in order) for a, b in ((0, 3), (3, 103), (103, 1003))]
    assert counts == [702, 201, 100] and max(Counter(i for i in order if i < 3).values()) == 234


@pytest.mark.parametrize(
    ("sets", "fragments"),
    [
        ([{"path": "a.jsonl", "wieght": 1}], ["number 1 of the list", "'wieght'", "'weight'"]),
        (
            [{"path": "a.jsonl", "weight": 0}, {"weight": "x"}],
            ["above 0, got 0", "number 2 of the list: weight", "path: missing"],
        ),
        ([{"path": "a.jsonl", "weight": 1}, "a.jsonl"], ["some data sets have one and others none"]),
        ([{"path": "a.jsonl"}, {"path": "gone.jsonl"}], ["no file 'gone.jsonl'"]),
        (
            [{"path": "a.jsonl"}, {"path": "p.jsonl"}],
            ["'p.jsonl' has rows of prompt (text), completion (text)", "of one form"],
        ),
    ],
)
def test_data_sets_that_do_not_go_together(sets: Any, fragments: list[str]) -> None:
    numbered("a.jsonl", 3)
    write("p.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(RecipeError) as refused:
        setup_of(sets)
    assert all(fragment in str(refused.value) for fragment in fragments), str(refused.value)


def test_a_share_is_held_out_of_all_data_sets() -> None:
    a = write("a.jsonl", [{"text": f"row {n % 40}"} for n in range(60)])  # twenty rows stand there twice
    b = numbered("b.jsonl", 40, 40)
    for rows in ([{"path": a, "weight": 1}, {"path": b, "weight": 3}], [a, b]):
        setup = setup_of(rows, "eval_dataset: 20%\n")
        train, held = list(setup.train["text"]), list(setup.held_out["text"])
        assert 19 <= len(held) <= 20 and not set(train) & set(held)
        assert {setup.sources[1].place(i).number for i in range(len(held))} >= {1} or len(held) > 1
        assert held == list(setup_of(rows, "eval_dataset: 20%\nmax_train_samples: 4\n").held_out["text"])
    assert set(train) | set(held) == {f"row {n}" for n in range(80)} and len(train) + len(held) == 100
    assert held != list(setup_of([a, b], "eval_dataset: 20%\nseed: 1\n").held_out["text"])
    for share, said in (("0%", "above 0%"), ("100%", "below 100%")):
        with pytest.raises(RecipeError, match=said):
            setup_of(a, f"eval_dataset: {share}\n")
    with pytest.raises(RecipeError, match="all the same"):
        setup_of(write("same.jsonl", [{"text": "x"}] * 4), "eval_dataset: 5%\n")


def test_a_share_of_a_task(place: Path) -> None:
    rows = [{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(40)]
    setup = setup_of(write("c.jsonl", rows), "eval_dataset: 25%\n", "classification")
    assert (len(setup.train), len(setup.held_out), setup.labels) == (30, 10, ("a", "b"))


def test_folders_of_save_to_disk() -> None:
    one = datasets.Dataset.from_list([{"instruction": "Add.", "input": "1 2", "output": str(n)} for n in range(4)])
    one.save_to_disk("one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk("both")
    answers = [[{"role": "assistant", "content": str(n)}] for n in range(4)]
    assert list(setup_of("one").train["completion"]) == answers and setup_of("one").held_out is None
    both = setup_of("both")
    assert len(both.train) == 4 and list(both.held_out["completion"]) == answers[1:2]
    with pytest.raises(RecipeError, match="no split 'tset', but train, test.* Did you mean 'test'"):
        setup_of("both", "dataset_train_split: tset\n")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"a": "b"', "Expecting ',' delimiter at column 10"),
        ('{"a": "b",', "Expecting property name enclosed in double quotes at column 11"),
        ('  {"a" "b"}', "Expecting ':' delimiter at column 8"),
        ('{"a": "é', "Unterminated string starting at column 7"),
        ('{"a": 1}}', "Extra data at column 9"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""], ids=["line", "windows", "none"])
def test_the_column_of_a_broken_row_is_that_of_its_line(row: str, says: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f'{{"a": 1}}\n{row}{end}'.encode())
    assert broken_lines(path) == [f"{path}, line 2: not readable as JSON ({says})"]


def test_what_is_wrong_with_rows_is_said_with_one_key(tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path / 'out'}", "dataset_name=gone.jsonl"]
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstart", settings)
    assert [p.text.partition("(")[0] for p in error.value.problems] == [
        "command line: dataset_name: no file 'gone.jsonl' "
    ]
