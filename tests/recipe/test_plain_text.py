"""Plain text as a data set: a line, a paragraph or a document a row, as the text loader of `datasets` has them."""

import json
from pathlib import Path

import datasets
import pytest

from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.rows import load
from layerpeft.recipe.trainer import prepare, tokenized

pytestmark = pytest.mark.usefixtures("shallow")

TEXT = "Ana moved .\n\nBen – ünï ✓\nstayed .\n\n\n\n\nlast\n"
RECIPE = "model_name_or_path: layerpeft://llama-6m\noutput_dir: out\nlayerpeft: {method: lora, select: last:1, r: 2}\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("by", ["line", "paragraph", "document"])
def test_rows_are_those_of_datasets(by: str) -> None:
    wanted = datasets.load_dataset("text", data_files="a.txt", split="train", sample_by=by)
    found = load("a.txt", config=None, split="train", by=by)
    assert found is not None
    assert [row["text"] for _, row in found] == list(wanted["text"]) and len(found) == len(wanted)
    lines = TEXT.split("\n")
    for place, row in found:  # a place says the line on which the row begins
        assert lines[int(place.where.rpartition(" ")[2]) - 1] == row["text"].split("\n")[0]
    Path("crlf.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    again = load("crlf.txt", config=None, split="train", by=by)
    assert again is not None and [row for _, row in again] == [row for _, row in found]


def test_a_recipe_says_what_a_row_is_and_what_is_no_text_is_named() -> None:
    Path("texts").mkdir()
    (Path("texts") / "train.txt").write_text(TEXT, encoding="utf-8")
    Path("r.yaml").write_text(f"trainer: sft\ndataset_name: texts\nsample_by: paragraph\n{RECIPE}", encoding="utf-8")
    setup = tokenized(prepare(load_recipe("r.yaml")))
    assert len(setup.train) == 3
    setup = tokenized(prepare(load_recipe("r.yaml", ["sample_by=null"])))
    assert len(setup.train) == 4 and setup.counts["training"].dropped == {"hold no text": 5}
    Path("bad.txt").write_bytes(b"good\nno \xff text\n")
    with pytest.raises(RecipeError, match=r"bad.txt, line 2: byte 4 \(0xff\) is no UTF-8"):
        load_recipe("r.yaml", ["dataset_name=bad.txt"])
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RecipeError, match=r"sample_by: is for plain text"):
        load_recipe("r.yaml", ["dataset_name=rows.jsonl"])
    with pytest.raises(RecipeError, match="sample_by.*'paragraph'"):
        load_recipe("r.yaml", ["sample_by=paragraf"])


@pytest.mark.slow
def test_preview_init_and_eval_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("".join(f"number {n} ✓\nof all\n\n" for n in range(40)), encoding="utf-8")
    words = ["init", "--model", "layerpeft://llama-6m", "--data", "a.txt", "--task", "causal_lm", "sample_by=paragraph"]
    assert main([*words, "--fit", "24GB", "output_dir=out", "save_strategy='no'"]) == 0
    assert "# 40 rows" in Path("recipe.yaml").read_text(encoding="utf-8")
    assert main(["preview", "recipe.yaml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["counts"]["training"]["read"] == 38 and "number" in shown["rows"][0]["parts"][0]["text"]
    assert main(["train", "recipe.yaml", "max_steps=1"]) == 0
    for more, rows in (([], 40), (["--sample-by", "line"], 120)):
        assert main(["predict", "out", "a.txt", "--out", f"{rows}.jsonl", "max_new_tokens=1", *more]) == 0
        assert f"{rows} rows read" in capsys.readouterr().out
    assert main(["eval", "out", "a.txt"]) == 0
    assert "perplexity: " in capsys.readouterr().out
