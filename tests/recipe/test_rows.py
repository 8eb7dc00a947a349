"""Rows as they were written: what a cell holds, which rows are left, and what is said of those that no trainer can read."""

import csv
import errno
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import datasets
import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe import check, rows
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.reading import DEEPEST, text_of
from layerpeft.recipe.trainer import make_trainer, prepare, tokenized

pytestmark = pytest.mark.usefixtures("shallow")

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SFT = """\
trainer: sft
model_name_or_path: layerpeft://llama-6m
dataset_name: {file}
output_dir: out
layerpeft: {{method: lora, select: last:2, r: 4}}
max_length: 32
"""
CLASSES = SFT.replace("sft", "classification", 1)
PAIR = {"prompt": "Why?", "completion": " So."}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*made: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in made)


def write(name: str, content: str | bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def setup_of(content: str | bytes, recipe: str = SFT, more: str = "", file: str = "d.jsonl", **other: str) -> Any:
    """The rows of a recipe, as they are before they become tokens."""
    write(file, content)
    for name, text in other.items():
        write(f"{name}.jsonl", text)
    write("r.yaml", recipe.format(file=file) + more)
    return prepare(load_recipe("r.yaml"))


def texts(name: str | list[str], columns: dict[str, str]) -> list[Any]:
    return list(rows.shape(rows.load(name, config=None, split="train"), "sft", columns)["text"])


# ---- as they were written -------------------------------------------------------------------------------------------

WORDS = [
    "None", "NA", "N/A", "null", "nan", "", "007", "2", "2.0", "1e5", "True", "TRUE", "yes", "2024-01-02", "9007199254740993",
    "12345678901234567890123", "1_000", " spaced ", "-0", "é ✓ 你", 'say "hi", twice', "two\nlines", "two\r\nlines", "#x", "\\n",
    "[1]",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_cell_of_a_table_is_its_text(suffix: str, place: Path) -> None:
    made = io.StringIO()
    csv.writer(made, delimiter="\t" if suffix == ".tsv" else ",").writerows([("n", "a"), *enumerate(WORDS)])
    write(f"d{suffix}", b"\xef\xbb\xbf" + made.getvalue().encode())
    assert texts(f"d{suffix}", {"text": "{n}:{a}"}) == [f"{n}:{word}" for n, word in enumerate(WORDS)]
    write(f"d{suffix}", made.getvalue().replace("\r\n", "\n").encode())
    assert len(texts(f"d{suffix}", {"text": "{n}:{a}"})) == len(WORDS)


# what stands in a JSON file -> what a template makes of it
CELLS = {
    '"007"': "007", "1": "1", "1.0": "1.0", "1.50": "1.50", "1e3": "1e3", "-0.0": "-0.0", "9007199254740993": "9007199254740993",
    "12345678901234567890123": "12345678901234567890123", "true": "true", '"true"': "true", "null": "", '"null"': "null",
    '{"name": null, "paid": true}': '{"name": null, "paid": true}',
    "NaN": "NaN", "-1": "-1", '[1, 2.50, "é", [null]]': '[1, 2.50, "é", [null]]',
    '{"x": {"y": []}}': '{"x": {"y": []}}', '"\\u00e9"': "é", '"2024-01-02"': "2024-01-02", '"a\\nb"': "a\nb",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["d.jsonl", "lines.json", "list.json", "list.jsonl", "spread.json"])
def test_a_cell_of_json_is_its_text_whatever_stands_in_other_rows(kind: str, place: Path) -> None:
    made = [f'{{"n": {n}, "a": {cell}}}' for n, cell in enumerate(CELLS)]
    text = "[" + ",\n".join(made) + "]" if "list" in kind else "\n".join(made)
    write(kind, "\n".join(row.replace(", ", ",\n", 1) for row in made) if "spread" in kind else text)
    assert texts(kind, {"text": "{n}:{a}"}) == [f"{n}:{word}" for n, word in enumerate(CELLS.values())]
    for row in made[:6]:  # alone, each is what it was among the others
        write("one.jsonl", row)
        assert texts("one.jsonl", {"text": "{n}:{a}"})[0] in [f"{n}:{word}" for n, word in enumerate(CELLS.values())]


def test_cells_of_parquet(place: Path) -> None:
    import datetime
    import decimal

    table = pyarrow.table({
        "float": pyarrow.array([0.1, None], pyarrow.float32()), "decimal": [decimal.Decimal("1.10")] * 2,
        "time": [datetime.datetime(2024, 1, 2, 3, 4, 5)] * 2, "day": [datetime.date(2024, 1, 2)] * 2,
        "list": [[1, 2], None], "bool": [True, None], "big": pyarrow.array([2**63 + 1] * 2, pyarrow.uint64()),
    })  # fmt: skip
    pyarrow.parquet.write_table(table, "d.parquet")
    template = {"text": "|".join(f"{{{name}}}" for name in table.column_names)}
    want = "0.1|1.10|2024-01-02 03:04:05|2024-01-02|[1, 2]|true|9223372036854775809"
    assert texts("d.parquet", template) == [want, "|1.10|2024-01-02 03:04:05|2024-01-02|||9223372036854775809"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=4),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
)
def test_whatever_is_written_is_read_back(cells: list[str], value: Any, place: Path) -> None:
    made = io.StringIO()
    csv.writer(made, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *((cell, "x") for cell in cells)])
    write("d.csv", made.getvalue())
    assert texts("d.csv", {"text": "{a}{b}"}) == [f"{cell}x" for cell in cells]
    write("d.jsonl", json.dumps({"a": value}))
    _, row = next(iter(rows.load("d.jsonl", config=None, split="train")))
    assert text_of({"a": row["a"]}) == json.dumps({"a": value}, ensure_ascii=False)


def test_turns_keep_the_keys_that_they_have(place: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1.5}}}]}
    setup = setup_of(lines({"messages": [CHAT[0], call]}, {"messages": CHAT, "unused": 1}))
    assert list(setup.train["messages"]) == [[CHAT[0], call], CHAT] and setup.train.column_names == ["messages"]


def test_files_differ_in_columns_that_nobody_reads(place: Path) -> None:
    write("b.jsonl", lines({"source": "x", "a": "2", "q": "two?"}))
    setup = setup_of(
        lines({"q": "one?", "a": 1}),
        SFT.replace("{file}", "[{file}, b.jsonl]"),
        'columns: {prompt: "{q}", completion: "{a}"}\n',
    )
    assert setup.train.to_list() == [{"prompt": "one?", "completion": "1"}, {"prompt": "two?", "completion": "2"}]


def test_folders_with_brackets_and_files_by_split(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("project [v2]/train.csv", "text,label\nNA,007\nb,2\n")
    write("project [v2]/test.jsonl", lines({"text": 1}))
    for name in ("project [v2]/train.csv", str(place / "project [v2]" / "*.csv"), "project [v2]"):
        assert [row["text"] for _, row in rows.load(name, config=None, split="train")] == ["NA", "b"]
    assert rows.load("project [v2]", config=None, split="validation", optional=True) is None
    with pytest.raises(RecipeError, match="there is no such split, but train, test"):
        rows.load("project [v2]", config=None, split="validation")
    write("said/README.md", "---\nconfigs:\n- config_name: default\n  data_files: x.csv\n---\n")
    write("said/x.csv", "a,b\nNA,007\n")
    assert [dict(row) for _, row in rows.load("said", config=None, split="train")] == [{"a": "NA", "b": "007"}]
    monkeypatch.chdir(place / "project [v2]")
    assert (
        rows.local_files("*.csv") == [Path("train.csv")]
        and len(rows.load("train.csv", config=None, split="train")) == 2
    )


def test_many_rows_go_to_the_disk_and_are_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    write("d.jsonl", lines({"a": None, "b": {"c": 1}}, {"a": "NA", "b": 1.5}, {"a": 7}))
    few = texts("d.jsonl", {"text": "{a}{b}"})
    monkeypatch.setattr(rows, "SMALL", 0)
    assert texts("d.jsonl", {"text": "{a}{b}"}) == few == ['{"c": 1}', "NA1.5", "7"]
    write("d.jsonl", lines({"a": 1, "b": 2}, {"a": None, "b": 3}, {"a": "\ud800"}))
    with pytest.raises(RecipeError, match=r"line 2: row 2 has no text(.|\n)*line 3: row 3 has half of a character"):
        texts("d.jsonl", {"text": "{a}"})


# ---- labels ---------------------------------------------------------------------------------------------------------


def _labels(values: list[str], kind: str) -> Any:
    """Class names of labels that are spelled as in JSON, in a file of a kind."""
    if kind == "csv":
        content = "text,label\n" + "".join(
            f't{i},"{json.loads(v, parse_float=str, parse_int=str)}"\n' for i, v in enumerate(values)
        )
    elif kind == "parquet":
        table = pyarrow.table({"text": [f"t{i}" for i in range(len(values))], "label": [json.loads(v) for v in values]})
        pyarrow.parquet.write_table(table, "d.parquet")
        content = Path("d.parquet").read_bytes()
    else:
        content = "\n".join(f'{{"text": "t{i}", "label": {value}}}' for i, value in enumerate(values))
    more = 'columns: {text: "{text}", label: "{label}"}\n' if kind == "columns" else ""
    return setup_of(content, CLASSES, more, f"d.{kind if kind in ('csv', 'parquet') else 'jsonl'}").labels


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "columns", "parquet"])
def test_one_rule_says_what_a_class_is(kind: str, place: Path) -> None:
    assert _labels(["10", "9", "-1", "9"], kind) == ("9", "10", "-1")
    assert _labels(['"01"', '"1"', '"None"', '"NA"'], kind) == ("01", "1", "NA", "None")
    for measured in (["0.5", "1.5"], ["1.0", "2.0"], ['"0.5"', '"1.5"'], ["1e-3", "2e-3"]):
        assert _labels(measured, kind) == ("score",)  # of a number
    if kind in ("jsonl", "columns"):
        assert _labels(["1", '"1"', "true", '"true"', '"v1.5"'], kind) == ("1", "true", "v1.5")
        with pytest.raises(RecipeError, match="row 2 has the label NaN"):
            _labels(["1", "NaN"], kind)


def test_names_that_the_data_or_the_checkpoint_declares(place: Path) -> None:
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["late", "early"])})
    datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}], names).to_parquet("d.parquet")
    setup = setup_of(Path("d.parquet").read_bytes(), CLASSES, file="d.parquet")
    assert setup.labels == ("late", "early") and list(setup.train["labels"]) == [1, 0]
    about = "features:\n  - {name: text, dtype: string}\n  - {name: label, dtype: {class_label: {names: {'0': late, '1': NA}}}}"
    write("said/README.md", f"---\ndataset_info:\n  {about}\n---\n")
    write("said/train.csv", "text,label\nNA,1\nb,NA\nc,0\n")
    write("r.yaml", CLASSES.format(file="said"))
    setup = prepare(load_recipe("r.yaml"))
    assert setup.labels == ("late", "NA") and list(setup.train["labels"]) == [1, 1, 0] and setup.examples is None
    _head(("pos", "neg"))
    setup = setup_of(
        lines({"text": "a", "label": "neg"}, {"text": "b", "label": "pos"}),
        CLASSES.replace("layerpeft://llama-6m", "head"),
    )
    assert setup.labels == ("pos", "neg")


def _head(names: tuple[str, ...]) -> None:
    """A checkpoint's config with a head for classes of these names."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(rows.resolve("layerpeft://llama-6m")))
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.LlamaConfig(vocab_size=4096, pad_token_id=3, id2label=dict(enumerate(names)), **sizes)
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained("head")
    tokenizer.save_pretrained("head")
    write("head/model.safetensors", "")


def test_a_head_of_another_size_is_known_before_weights_load(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _head(("reward",))
    recipe = CLASSES.replace("layerpeft://llama-6m", "head").format(file="d.jsonl").replace("last:2", "last:1")
    write("d.jsonl", lines(*({"text": f"t{i}", "label": i % 3} for i in range(6))))
    write("r.yaml", recipe)
    assert main(["plan", "r.yaml"]) == 2
    said = capsys.readouterr().err
    assert "line 2: model_name_or_path: the checkpoint has a head for 1 class, the rows have 3" in said
    cure = "model_init_kwargs: {ignore_mismatched_sizes: true}"
    assert cure in said
    transformers.LlamaForSequenceClassification(transformers.AutoConfig.from_pretrained("head")).save_pretrained("head")
    write("r.yaml", f"{recipe}{cure}\nmax_steps: 1\nsave_strategy: 'no'\nreport_to: none\n")
    assert main(["train", "r.yaml"]) == 0 and main(["merge", "out", "merged"]) == 0
    capsys.readouterr()
    loaded = layerpeft.load("out")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("merged")
    assert loaded.config.id2label == merged.config.id2label == {i: str(i) for i in range(3)}
    assert loaded.config.problem_type == merged.config.problem_type == "single_label_classification"
    head = loaded.base_model.model.score.modules_to_save["default"].weight
    assert head.shape == (3, 32) and torch.equal(head, merged.score.weight)


# ---- what is left ---------------------------------------------------------------------------------------------------


def _long(words: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "word " * words, "completion": " yes and more of it", **more}


def test_rows_that_teach_nothing_are_counted_and_named(place: Path) -> None:
    setup = setup_of(lines(*[_long(3)] * 2, *[_long(90)] * 3, _long(29), {"prompt": "a", "completion": ""}))
    setup = tokenized(setup)
    found = setup.counts["training"]
    late = "have no label left within max_length: 32"
    assert (found.read, found.kept, found.cut, found.blank, dict(found.dropped)) == (7, 4, 1, 1, {late: 3})
    assert found.first == "d.jsonl, line 3" and len(setup.train) == 4
    assert (
        f"7 read, 3 dropped, 4 left; 3 of 7 rows {late}, and are dropped (the first: d.jsonl, line 3); 1 cut"
        in found.told("t")
    )
    ends = "truncation_mode: keep_end\n"
    assert tokenized(setup_of(lines(*[_long(90)] * 3), more=ends)).counts["training"].cut == 3
    texts = setup_of(lines({"text": ""}, {"text": "one two"}, {"text": " \n"}))
    assert dict(tokenized(texts).counts["training"].dropped) == {"hold no text": 2}
    classes = setup_of(
        lines({"text": "a " * 90, "label": 1}, {"text": "b", "label": 2}, {"text": " ", "label": 1}), CLASSES
    )
    assert (classes.counts["training"].cut, classes.counts["training"].blank, len(classes.train)) == (1, 1, 3)
    assert len(classes.train[0]["input_ids"]) == 32


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_rows_are_counted_before_they_are_packed(strategy: str, place: Path) -> None:
    more = f"packing: true\npacking_strategy: {strategy}\n"
    counts = tokenized(setup_of(lines(*[_long(90)] * 3, _long(3)), more=more)).counts["training"]
    assert (counts.kept, sum(counts.dropped.values())) == ((1, 3) if strategy == "bfd" else (4, 0))


def test_none_left_is_an_error_with_a_cure(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("e.jsonl", lines(*[_long(90), _long(80)] * 4))
    write("d.jsonl", lines(PAIR))
    for file, key, words in (
        (
            "e.jsonl",
            "dataset_name",
            "all 8 prompts are longer than max_length: 32, no row is left (the first: e.jsonl, line 1)",
        ),
        ("d.jsonl\neval_dataset: e.jsonl", "eval_dataset", "0 of 8 held-out rows left: all 8 prompts are longer"),
    ):
        write("r.yaml", SFT.format(file=file))
        assert main(["plan", "r.yaml"]) == 2
        said = capsys.readouterr().err
        assert f"{key}: " in said and words in said
        enough = said.partition("; max_length: ")[2].split()[0]
        counts = tokenized(prepare(load_recipe("r.yaml", [f"max_length={enough}"], "plan"))).counts
        assert 0 < counts["held-out" if key == "eval_dataset" else "training"].kept <= 4
    more = [_long(90)] * 200 + [_long(3)]  # a plan tries some rows; where none of them is left, all
    assert tokenized(setup_of(lines(*more)), 64).counts == {}


@pytest.mark.parametrize(
    ("made", "more"),
    [
        ([_long(3), _long(90), _long(29)], ""),
        ([{"text": "a b c"}, {"text": "word " * 90}], "packing: true\n"),
        (
            [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}],
            "assistant_only_loss: true\nchat_template_path: t.jinja\n",
        ),
        ([{"prompt": CHAT[:1], "completion": CHAT[1:]}], "completion_only_loss: false\n"),
        (
            [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
            "eos_token: '<|pad|>'\n",
        ),
    ],
)
def test_the_tokens_are_those_of_the_trainer(made: list[Any], more: str, place: Path, llama: Any) -> None:
    said = "{{ '<|' + m.role + '|>' }}{% generation %}{{ m.content }}{% endgeneration %}"
    asked = "{{ '<|' + m.role + '|>' + m.content }}"
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{said}{{% else %}}{asked}{{% endif %}}{{% endfor %}}"
    )
    write("t.jinja", template)
    setup = setup_of(lines(*made), more=more)
    theirs = make_trainer(setup, llama).train_dataset
    ours = make_trainer(tokenized(setup_of(lines(*made), more=more)), llama).train_dataset
    assert [row["input_ids"] for row in ours] == [row["input_ids"] for row in theirs]
    assert [row["labels"] for row in ours] == [row["labels"] for row in theirs]
    assert any(label != -100 for row in ours for label in row["labels"])


# ---- what no trainer can read ---------------------------------------------------------------------------------------

GOOD = lines(PAIR, PAIR)
CLASS_ROWS = lines({"text": "a", "label": 1}, {"text": "b", "label": 2})
DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
ASK = {"role": "user", "content": "Why?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
JSONL, JSON, CSV, TSV = "d.jsonl", "d.json", "d.csv", "d.tsv"

# id: (file, its content, fragments of the message, the content after the cure, or more lines of the recipe)
Case = tuple[str, str | bytes, list[str], str]
BROKEN: dict[str, Case] = {
    # files
    "deep": (JSONL, GOOD + DEEP, [f"d.jsonl, line 3: nested more than {DEEPEST} deep"], GOOD),
    "deep_first": (JSONL, DEEP, ["d.jsonl, line 1: nested"], GOOD),
    "deep_list": (JSON, f"[{GOOD.splitlines()[0]},\n{DEEP}]", ["d.json, line 2: nested"], f"[{GOOD.splitlines()[0]}]"),
    "middle": (JSONL, GOOD + '{"prompt": \n' + GOOD, ["d.jsonl, line 3: not readable as JSON"], GOOD),
    "middle_of_a_list": (
        JSON,
        '[{"prompt": "a", "completion": "b"},\n{"prompt": }]',
        ["d.json, line 2: not readable"],
        f"[{lines(PAIR)}]",
    ),
    "open_list": (JSON, f"[{lines(PAIR)}", ["d.json, line 2: ", "not closed"], f"[{lines(PAIR)}]"),
    "key_twice": (
        JSONL,
        '{"prompt": "a", "prompt": "b", "completion": "c"}\n',
        ["line 1", "the key 'prompt' stands twice"],
        GOOD,
    ),
    "many_keys": (
        JSONL,
        "{" + "".join(f'"k{i}": 1, ' for i in range(30_000)) + '"k29999": 2}\n',
        ["line 1", "the key 'k29999' stands twice"],
        GOOD,
    ),
    "a_number": (JSONL, GOOD + "5\n", ["d.jsonl, line 3: a row must be a mapping of columns, not a number"], GOOD),
    "empty": (JSONL, "", ["d.jsonl is empty"], GOOD),
    "empty_list": (JSON, "[]", ["d.json is empty"], f"[{lines(PAIR)}]"),
    "garbage": (JSONL, b"\x89PNG\x00\x01\xff\xfe", ["d.jsonl, line 1", "this is no text"], GOOD),
    "no_parquet": ("d.parquet", b"PAR1", ["d.parquet is no readable .parquet file"], ""),
    "half_a_character": (
        JSONL,
        GOOD + lines({"prompt": "\ud83d", "completion": "x"}),
        ["line 3: row 3 has half of a character"],
        GOOD,
    ),
    "header": (
        CSV,
        "prompt,completion\n",
        ["d.csv, line 1: a header, and no row below it"],
        "prompt,completion\na,b\n",
    ),
    "column_twice": (
        CSV,
        "prompt,prompt,completion\na,b,c\n",
        ["line 1", "'prompt' twice"],
        "prompt,other,completion\na,b,c\n",
    ),
    "many_cells": (
        CSV,
        "prompt,completion\na,b\na,b, c\n",
        ["d.csv, line 3: number of cells: 3"],
        'prompt,completion\na,"b, c"\n',
    ),
    "few_cells": (
        TSV,
        "prompt\tcompletion\na\tb\na\n",
        ["d.tsv, line 3: number of cells: 1"],
        "prompt\tcompletion\na\tb\n",
    ),
    "open_quote": (
        CSV,
        'prompt,completion\na,"b\nc,d\n',
        ["d.csv, line 2", "written twice"],
        'prompt,completion\na,"""b"\nc,d\n',
    ),
    "quote_inside": (
        CSV,
        'prompt,completion\na,b\n"x"y,d\n',
        ["d.csv, line 3", "written twice"],
        'prompt,completion\n"""x""y",d\n',
    ),
    # columns
    "no_column": (
        CSV,
        "question,answer\na,b\n",
        ["question, answer", "columns: {prompt:"],
        'columns: {prompt: "{question}", completion: "{answer}"}',
    ),
    "long_column": (CSV, f"a,{'c' * 200_000}\n1,2\n", ["have a, ccc", "columns: {prompt:"], "prompt,completion\na,b\n"),
    "many_columns": (
        CSV,
        ",".join(f"c{i}" for i in range(9_000))
        + "\n"
        + "1," * 8_999
        + '1\n#columns: {prompt: "{q}", completion: "{c1}"}',
        ["columns.prompt: no column 'q' in the data; it has c0, c1, ", "c39 and 8960 more"],
        "prompt,completion\na,b\n",
    ),
    "pictures": (
        JSONL,
        lines({**PAIR, "image": "x"}),
        ["images", "columns"],
        'columns: {prompt: "{prompt}", completion: "{completion}"}',
    ),
    # rows
    "null": (
        JSONL,
        lines(PAIR, PAIR, {"prompt": "q", "completion": None}),
        ["d.jsonl, line 3: row 3 has no completion"],
        GOOD,
    ),
    "lacking": (JSONL, lines(PAIR, {"prompt": "q"}), ["d.jsonl, line 2: row 2 has no completion"], GOOD),
    "null_text": (
        JSON,
        json.dumps([{"text": "a"}, {"text": None}], indent=1),
        ["d.json, line 5: row 2 has no text"],
        '[{"text": "a"}]',
    ),
    "an_object": (
        JSONL,
        lines({"prompt": {"a": 1}, "completion": "b"}),
        ["row 1 has a prompt that is an object"],
        'columns: {prompt: "{prompt}", completion: "{completion}"}',
    ),
    "two_ways": (
        JSONL,
        lines(PAIR, {"prompt": [ASK], "completion": CHAT[1:]}),
        ["line 2: row 2 has its prompt as a list of turns"],
        GOOD,
    ),
    "no_turns": (JSONL, lines({"messages": []}), ["row 1 has messages that are empty"], lines({"messages": CHAT})),
    "turns_as_text": (
        JSONL,
        lines({"messages": "hi"}),
        ["row 1 has messages that are text"],
        lines({"messages": CHAT}),
    ),
    "no_role": (
        JSONL,
        lines({"messages": CHAT}, {"messages": [ASK, {"content": "x"}]}),
        ["line 2", "number 2) without role"],
        lines({"messages": CHAT}),
    ),
    "no_content": (
        JSONL,
        lines({"messages": [ASK, {"role": "assistant", "content": None}]}),
        ["number 2) of 'assistant' without content"],
        lines({"messages": CHAT}),
    ),
    "tool_call": (
        JSONL,
        lines({"messages": CHAT}, {"messages": [ASK, CALL]}),
        ["d.jsonl, line 2: row 2 cannot be turned into tokens", "chat_template_path"],
        lines({"messages": CHAT}),
    ),
    "tokens": (
        JSONL,
        lines({"input_ids": [1, "a"]}),
        ["row 1 has input_ids that are no list of numbers of tokens"],
        lines({"input_ids": [1, 2]}),
    ),
    "no_token": (
        JSONL,
        lines({"input_ids": [1, 2]}, {"input_ids": [1, 4096]}),
        ["line 2: row 2 has input_ids that are no tokens (0 to 4095)"],
        lines({"input_ids": [1, 2]}),
    ),
    "huge_token": (JSONL, lines({"input_ids": [10**30]}), ["row 1 has input_ids that"], lines({"input_ids": [1, 2]})),
    "lengths": (
        JSONL,
        lines({"input_ids": [1, 2, 3], "labels": [1]}),
        ["row 1 has lists of different lengths: input_ids 3, labels 1"],
        lines({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}),
    ),
    "half_a_conversation": (
        JSONL,
        lines({"prompt": [ASK], "completion": "So."}),
        ["row 1 has its prompt as a list of turns and its completion as text"],
        GOOD,
    ),
    "tools": (JSONL, lines({"messages": CHAT, "tools": "no"}), ["d.jsonl, line 1: row 1"], lines({"messages": CHAT})),
    "half_in_a_turn": (JSONL, lines({"messages": [{**ASK, "content": "\ud83d"}]}), ["row 1 has half of"], GOOD),
    "semicolons": (CSV, "prompt;completion\na;b\n", ["one column, with ';' in its name"], "prompt,completion\na,b\n"),
    "carriage_returns": (
        CSV,
        "prompt,completion\ra,b\r",
        ["line 1", "tr '\\r' '\\n' < d.csv"],
        "prompt,completion\na,b\n",
    ),
    "eos": (JSONL, GOOD + "#eos_token: <pad>", ["eos_token: '<pad>' is no token", "'<|pad|>'?"], "eos_token: <|pad|>"),
    "padding_free": (JSONL, GOOD + "#padding_free: true", ["padding_free: ", "max_length: null"], "max_length: null"),
    "packing": (JSONL, GOOD + "#packing: true\nmax_length: null", ["packing: needs a max_length"], "packing: true"),
    "split": (
        JSONL,
        GOOD + "#dataset_train_split: dev",
        ["line 7: dataset_train_split: files have neither splits"],
        GOOD,
    ),
    "template": (JSONL, GOOD + "#chat_template_path: t.jinja", ["chat_template_path: no template at 't.jinja'"], GOOD),
    "too_long": (
        JSONL,
        lines(_long(90)),
        ["all 1 prompts are longer than max_length: 32", "max_length: 93 keeps the shortest"],
        "max_length: 93",
    ),
    "no_text_at_all": (
        JSONL,
        lines({"text": ""}),
        ["all 1 rows hold no text", "d.jsonl, line 1"],
        lines({"text": "a b"}),
    ),
    "assistants": (
        JSONL,
        lines({"messages": CHAT}) + "#assistant_only_loss: true",
        ["assistant_only_loss: d.jsonl, line 1", "false trains on all turns"],
        "assistant_only_loss: false",
    ),
    "no_conversation": (
        JSONL,
        GOOD + "#assistant_only_loss: true",
        ["assistant_only_loss: d.jsonl, line 1"],
        "assistant_only_loss: false",
    ),
}
CLASS_BROKEN: dict[str, Case] = {
    "no_label": (
        JSONL,
        lines({"text": "a", "label": 1}, {"text": "b", "label": None}),
        ["line 2: row 2 has no label"],
        CLASS_ROWS,
    ),
    "empty_label": (CSV, "text,label\na,1\nb,\n", ["d.csv, line 3: row 2 has no label"], "text,label\na,1\nb,2\n"),
    "labels": (
        JSONL,
        lines({"text": "a", "label": [0, 1]}, {"text": "b", "label": 1}),
        ["d.jsonl, line 2: row 2 has its label as text, and row 1 as a list; write all rows one way"],
        CLASS_ROWS,
    ),
    "measured": (
        CSV,
        "text,label\na,0.5\nb,high\n",
        ["labels are of different kinds: d.csv, line 3: row 2 has the label high", 'label: "class {label}"'],
        'columns: {text: "{text}", label: "class {label}"}',
    ),
    "no_words": (JSONL, lines({"text": None, "label": 1}), ["line 1: row 1 has no text"], CLASS_ROWS),
    "one_class": (JSONL, lines({"text": "a", "label": 1}), ["one class only ('1')"], CLASS_ROWS),
    "all_empty": (
        JSONL,
        lines({"text": "", "label": 1}, {"text": "", "label": 2}),
        ["0 of 2 training rows left", "hold no text"],
        CLASS_ROWS,
    ),
}


SETTINGS = ("columns", "max_length", "assistant_only_loss", "eos_token", "packing")  # cures in the recipe


@pytest.fixture
def no_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(refuse))


@pytest.fixture
def rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers are chosen is looked at by other tests."""
    monkeypatch.setattr(check, "choice_problems", lambda recipe: [])


@pytest.mark.parametrize("name", [*BROKEN, *CLASS_BROKEN])
def test_rows_that_cannot_be_read(
    name: str, no_weights: None, rows_alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content, fragments, cure = {**BROKEN, **CLASS_BROKEN}[name]
    recipe = (CLASSES if name in CLASS_BROKEN else SFT).format(file=file)
    more = ""
    if isinstance(content, str):
        content, _, more = content.partition("#")
    write(file, content)
    write("r.yaml", f"{recipe.replace('max_length: 32', '') if 'max_length' in more else recipe}{more}\n")
    assert main(["train", "r.yaml"]) == 2
    said = capsys.readouterr()
    message = said.err[said.err.rindex("layerpeft: ") :]
    assert [f for f in fragments if f not in message] == [] and "Traceback" not in said.err and not Path("out").exists()
    assert len(message) < 3_000
    if not cure:
        return
    if cure.partition(":")[0] in SETTINGS:
        write("r.yaml", f"{recipe if cure == 'packing: true' else recipe.replace('max_length: 32', '')}{cure}\n")
    else:
        write(file, cure)
        write("r.yaml", recipe)
    assert tokenized(prepare(load_recipe("r.yaml"))).counts["training"].kept


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "LATIN1"), ("utf-16", "UTF-16")])
def test_another_encoding_is_named_with_the_command_that_helps(encoding: str, name: str, place: Path) -> None:
    write("my d.csv", "text,n\nplain,1\ncafé,2\n".encode(encoding))
    with pytest.raises(
        RecipeError, match=f"my d.csv, line .: byte .* is no UTF-8; for a text in {name}: iconv"
    ) as caught:
        rows.load("my d.csv", config=None, split="train")
    subprocess.run(str(caught.value).partition(f"{name}: ")[2], shell=True, check=True)
    assert texts("my d-utf8.csv", {"text": "{text}"}) == ["plain", "café"]


def test_a_folder_where_a_file_is_expected(place: Path) -> None:
    Path("d.jsonl").mkdir()
    with pytest.raises(
        RecipeError, match=r"'d.jsonl' is a folder \(of a folder, name the files in it: d.jsonl/\*.jsonl\)"
    ):
        rows.load("d.jsonl", config=None, split="train")
    write("d.jsonl/a.jsonl", GOOD)
    assert len(rows.load("d.jsonl/*.jsonl", config=None, split="train")) == 2


def test_every_file_must_have_the_columns_and_held_out_rows_the_classes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.jsonl", lines({"q": "1", "a": "1"}))
    write("b.jsonl", lines({"q": "1", "reply": "1"}))
    write("r.yaml", SFT.format(file="[a.jsonl, b.jsonl]") + 'columns: {prompt: "{q}", completion: "{a}"}\n')
    assert main(["plan", "r.yaml"]) == 2
    assert "columns.completion: b.jsonl: no column 'a' in the data; it has q, reply" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"eval_dataset: label: .*no training row has: 3 \(e.jsonl, line 2\)"):
        other = lines({"text": "a", "label": 1}, {"text": "b", "label": 3})
        setup_of(CLASS_ROWS, CLASSES, "eval_dataset: e.jsonl\n", e=other)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "stable_adamw", "grokadamw", "adamw_torch_8bit"])
def test_a_package_that_an_optimizer_lacks_is_known_to_a_plan(
    optim: str, no_weights: None, capsys, monkeypatch
) -> None:
    write("d.jsonl", GOOD)
    write("r.yaml", SFT.format(file="d.jsonl") + f"optim: {optim}\n")

    def lacking(arguments: Any, model: Any = None) -> None:  # whatever is installed here
        raise ImportError(f"You need to install `it` for {arguments.optim}")

    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lacking))
    for command in ("plan", "train"):
        assert main([command, "r.yaml"]) == 2
        assert f"line 7: optim: optimizer '{optim}': You need to install `it`" in capsys.readouterr().err


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_records_its_rows_and_a_full_disk_says_what_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("d.jsonl", lines(*[_long(90)] * 3, *[PAIR] * 5))
    write("e.jsonl", lines(PAIR, _long(90)))
    more = "eval_dataset: e.jsonl\nmax_steps: 2\nsave_steps: 1\nper_device_train_batch_size: 1\nsample_tokens: 0\nreport_to: none\n"
    write("r.yaml", SFT.format(file="d.jsonl") + more)
    calls: list[str] = []
    save = peft.PeftModel.save_pretrained

    def full(self: Any, folder: str, *args: Any, **kwargs: Any) -> None:
        calls.append(str(folder))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder, *args, **kwargs)

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", full)
    assert main(["train", "r.yaml"]) == 2
    said = capsys.readouterr().err
    kept = Path("out/checkpoint-1")
    assert "no room is left on the disk of out" in said and f"{kept} is whole" in said
    command = said.partition("with more room, layerpeft ")[2].partition(" goes on")[0].split()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert command == ["train", "r.yaml", "resume_from_checkpoint=true"] and main(command) == 0
    out = capsys.readouterr().out
    assert "training rows: 8 read, 3 dropped, 5 left" in out and "held-out rows: 2 read, 1 dropped, 1 left" in out
    found = json.loads(Path("out/layerpeft.json").read_text())["rows"]
    reason = {"have no label left within max_length: 32": 3}
    assert found["training"] == {
        "read": 8,
        "kept": 5,
        "cut": 0,
        "blank": 0,
        "dropped": reason,
        "max_length": 32,
        "first": "d.jsonl, line 1",
    }
    assert found["held-out"]["kept"] == 1
