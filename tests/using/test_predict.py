"""Predictions for rows of every kind: in their order, with names, and with a reason where there can be none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import peft
import pyarrow.parquet
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.recipe.shipped import resolve
from layerpeft.using import predict
from layerpeft.using.folder import find
from layerpeft.using.incoming import incoming

NAMES = {0: "gut", 1: "schlecht", 2: "naja – ü"}


@pytest.fixture(scope="module")
def bert() -> str:
    return resolve("layerpeft://toy-bert")


def adapter(bert: str, folder: Path, kind: str, task: str, **head) -> Path:
    """An adapter with a head of its own, whose names its record holds."""
    torch.manual_seed(3)
    base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(bert, **head)
    config = LayerLoraConfig(select="last:1", r=2, target_modules="all-linear", task_type=task)
    model = get_peft_model(base, config)
    for name, tensor in model.named_parameters():
        if "modules_to_save" in name or "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.5)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


def named(names):
    return {"id2label": names, "label2id": {n: i for i, n in names.items()}}


def written(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pyarrow.parquet.read_table(path).to_pylist()


def test_classes_with_names_in_the_order_of_the_rows(bert, tmp_path, capsys):
    folder = adapter(bert, tmp_path / "a", "SequenceClassification", "SEQ_CLS", **named(NAMES))
    texts = ["late again", "a much longer sentence about the train that came on time", "ü – naïve", "ok"]
    rows = tmp_path / "rows.csv"
    lines = ["id,sentence,label", *(f'{i},"{t}",x' for i, t in enumerate(texts)), "4,,x", "5", '6,"last one",x']
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = {}
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"out{suffix}"
        words = [
            "predict",
            str(folder),
            str(rows),
            "--out",
            str(out),
            "--column",
            "text={sentence}",
            "--batch-size",
            "2",
        ]
        assert main([*words, "--keep", "id"]) == 0
        assert "7 rows read, 5 predicted, 2 without a prediction" in capsys.readouterr().out
        found[suffix] = written(out)
        assert [int(row["row"]) for row in found[suffix]] == list(range(1, 8))
        assert [row["id"] for row in found[suffix]][:5] == list("01234")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, **named(NAMES))
    model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rest = [*texts, None, None, "last one"]
    for i, text in enumerate(rest):
        one, two, three = (found[s][i] for s in (".jsonl", ".csv", ".parquet"))
        if text is None:
            assert one["label"] is None and two["label"] == "" and three["score"] is None
            assert one["reason"] == two["reason"] == three["reason"] != ""
            continue
        with torch.no_grad():
            wanted = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert one["label"] == two["label"] == three["label"] == NAMES[int(wanted.argmax())] and one["reason"] is None
        assert one["score"] == float(two["score"]) == three["score"] == pytest.approx(float(wanted.max()), rel=1e-5)
        assert list(one["scores"]) == list(NAMES.values()) == list(json.loads(two["scores"]))
    assert "has no text" in found[".csv"][4]["reason"] and "number of cells" in found[".csv"][5]["reason"]


def test_a_folder_is_read_before_weights_are(bert):
    found = find("layerpeft://toy-bert")
    assert (str(found.folder), found.base, found.kind, found.trainer) == (
        bert,
        None,
        "AutoModelForMaskedLM",
        "masked_lm",
    )


@pytest.mark.slow
def test_several_labels_numbers_tags_and_answers(bert, tmp_path, capsys):
    def said(name, rows, kind, task, **head):
        folder = adapter(bert, tmp_path / name, kind, task, **head)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        out = tmp_path / f"{name}.out.jsonl"
        assert main(["predict", str(folder), str(tmp_path / f"{name}.jsonl"), "--out", str(out)]) == 0
        return written(out)

    many = {"problem_type": "multi_label_classification"}
    for row in said("many", [{"text": "late"}], "SequenceClassification", "SEQ_CLS", **named(NAMES), **many):
        assert row["labels"] == [n for n, s in row["scores"].items() if s >= 0.5] and len(row["scores"]) == 3
    one = {"num_labels": 1, "problem_type": "regression"}
    assert isinstance(said("number", [{"text": "late"}], "SequenceClassification", "SEQ_CLS", **one)[0]["score"], float)
    words = ["Anna", "lives", "in", "Paris", "unbelievably"]
    tags = named(dict(enumerate(("O", "B-PER", "I-PER", "B-LOC"))))
    rows = [{"tokens": words}, {"tokens": []}, {"tokens": "Anna lives"}]
    first, none, third = said("tags", rows, "TokenClassification", "TOKEN_CLS", **tags)
    assert first["words"] == words and len(first["tags"]) == 5 and third["words"] == words[:2]
    assert all(s["text"] == " ".join(words[s["first"] : s["last"] + 1]) for s in first["spans"])
    assert none["tags"] is None and none["reason"] == "has no tokens"
    context = "Anna lives in Paris . " * 60  # several windows
    rows = [{"question": "where ?", "context": context}, {"question": "where ?", "context": None}]
    first, none = said("answers", rows, "QuestionAnswering", "QUESTION_ANS")
    assert first["answer"] and first["answer"] in context and none["reason"] == "has no context"


def test_what_cannot_be_leaves_no_file(bert, tmp_path, capsys, monkeypatch):
    folder = adapter(bert, tmp_path / "a", "SequenceClassification", "SEQ_CLS", **named(NAMES))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    before = sorted(p.name for p in tmp_path.iterdir())
    for words, fragment in (
        ([str(rows), "--out", str(tmp_path / "o.xlsx")], ".parquet"),
        ([str(rows), "--out", str(rows)], "is there already; --overwrite"),
        ([str(rows), "--out", str(tmp_path / "o.csv"), "--keep", "txt"], "Did you mean 'text'?"),
        ([str(tmp_path / "none.csv"), "--out", str(tmp_path / "o.csv")], "none.csv"),
    ):
        monkeypatch.setattr("layerpeft.using.commands.load_found", lambda found: pytest.fail("weights were loaded"))
        assert main(["predict", str(folder), *words]) == 2
        assert fragment in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "open.csv").write_text('text\na\n"b\nc\n')  # nothing behind the quote can be read
    assert main(["predict", str(folder), str(tmp_path / "open.csv"), "--out", str(tmp_path / "o.csv")]) == 2
    assert "open.csv, line 3" in capsys.readouterr().err
    (tmp_path / "open.csv").unlink()
    monkeypatch.setattr(predict, "short", lambda value: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["predict", str(folder), str(rows), "--out", str(tmp_path / "o.csv")]) == 130
    assert capsys.readouterr().err.endswith("layerpeft: interrupted: nothing was saved\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def _anonymous() -> int:
    """Bytes of this process that are of no file."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_a_steady_amount_of_memory(bert, tmp_path, monkeypatch):
    folder = adapter(bert, tmp_path / "a", "SequenceClassification", "SEQ_CLS", **named(NAMES))
    rows, total, seen = tmp_path / "rows.csv", 100_000, []
    rows.write_text("text\n" + "".join(f"late again {i % 97}\n" for i in range(total)))
    real = predict.answers

    def watched(*given):
        for i, found in enumerate(real(*given)):
            if i in (total // 10, total - 1):
                seen.append(_anonymous())
            yield found

    monkeypatch.setattr(predict, "answers", watched)
    assert main(["predict", str(folder), str(rows), "--out", str(tmp_path / "o.csv"), "--batch-size", "128"]) == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == total + 1
    assert seen[1] - seen[0] < 8 * 2**20


def test_empty_answers_are_counted(tmp_path):
    class Silent:
        ahead, cut, limit = 2, 0, None

        def columns(self):
            return {"text": "text", "score": "number"}

        def item(self, cells):
            return cells["prompt"]

        def size(self, item):
            return len(item)

        def run(self, items):
            return [{"text": " " if item == "blank" else item[1:], "score": 0.5} for item in items]

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "a", "blank", "abc")), encoding="utf-8"
    )
    given = incoming(str(rows), "test", "sft", [("prompt",)], (), None)
    count = predict.predict(given, Silent(), tmp_path / "out.csv", 2)  # type: ignore[arg-type]
    assert (count.read, count.empty) == (4, 2)
    assert count.told(0, None) == "4 rows read, 4 predicted; 2 of the answers are empty"
    assert [row["text"] for row in written(tmp_path / "out.csv")] == ["b", "", " ", "bc"]
    assert predict.Count(1, 1).told(0, None).endswith("; 1 of the answers is empty")
