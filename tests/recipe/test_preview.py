"""What a preview shows is what trains: held against the batches of the trainer's own loader; and what a screen gets to see."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from layerpeft.cli import main
from layerpeft.recipe.preview import Part, Preview, Shown, preview
from layerpeft.recipe.preview_text import Screen, harmless, told
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import make_trainer, prepare, tokenized
from layerpeft.text import cells

pytestmark = pytest.mark.usefixtures("shallow")

RECIPE = """\
trainer: {trainer}
model_name_or_path: layerpeft://llama-6m
dataset_name: d.jsonl
output_dir: out
layerpeft: {{method: lora, select: last:2, r: 4}}
per_device_train_batch_size: 2
max_length: 24
"""
ROWS = [
    {"prompt": "Say \x1b[31mred\x07 \u202e", "completion": " 你好 ✓ Grüße\nline two"},
    {"prompt": "Count.", "completion": " one" * 40},
    {"prompt": "Count.", "completion": " one" * 40},
    {"prompt": "Why " * 40, "completion": " So."},
    {"prompt": "A", "completion": ""},
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(rows: list[Any], trainer: str = "sft", *settings: str) -> Any:
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.yaml").write_text(RECIPE.format(trainer=trainer))
    return load_recipe("r.yaml", settings, "plan")


def batches_of(asked: Any, llama: Any) -> list[Any]:
    """Those of a training, with a model that has weights."""
    return list(make_trainer(tokenized(prepare(asked)), llama).get_train_dataloader())


def flat(batch: Any, labels: Any) -> list[tuple[list[int], list[bool]]]:
    """Rows of a batch without padding, as ids and marks; the first token of a row is not learned."""
    found = []
    for ids, mask, marks in zip(batch["input_ids"], batch["attention_mask"].bool(), labels, strict=True):
        own = marks[mask].tolist()
        found.append((ids[mask].tolist(), [False, *own[1:]]))
    return found


def seen(found: Preview, name: str | None = None) -> list[tuple[list[int], list[bool]]]:
    return [(list(p.ids), list(p.learned)) for row in found.shown for p in row.parts if name in (None, p.name)]


def test_what_is_shown_is_what_trains(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(ROWS)
    wanted = [row for batch in batches_of(asked, llama) for row in flat(batch, batch["labels"] != -100)]
    with monkeypatch.context() as none:
        none.setattr(transformers.PreTrainedModel, "from_pretrained", None)  # no weight is loaded
        found = preview(asked, 4)
    assert seen(found) == wanted and len(wanted) == 4
    tally = found.counts["training"]
    assert (tally.read, tally.kept, tally.cut, tally.blank, sum(tally.dropped.values())) == (5, 4, 3, 1, 1)
    assert found.copies == {"training": 1}
    decode = found.tokenizer.decode
    cut = [p for row in found.shown for p in row.parts if p.cut]
    assert sorted(decode([*p.ids, *p.cut]) for p in cut) == sorted(
        f"{row['prompt']}{row['completion']}<|endoftext|>" for row in ROWS[:3]
    )
    ends = preview(recipe(ROWS, "sft", "max_train_samples=1", "max_length=16"), 1).shown[0].parts[0]
    assert decode([*ends.ids, *ends.cut]).endswith("line two<|endoftext|>") and not ends.before


def test_pairs_are_shown_as_they_train(llama: Any) -> None:
    rows = [
        {"prompt": "Count.", "chosen": " one" * 40, "rejected": " no"},
        {"prompt": "A", "chosen": " B", "rejected": " C"},
    ]
    asked = recipe(rows, "dpo", "report_to=none")
    batch = next(iter(make_trainer(tokenized(prepare(asked)), _wrapped(llama)).get_train_dataloader()))
    both = flat(batch, batch["completion_mask"].bool())
    found = preview(asked, 2)
    assert seen(found, "chosen") == both[:2] and seen(found, "rejected") == both[2:]
    long = next(row.parts[0] for row in found.shown if row.parts[0].cut)
    assert found.tokenizer.decode([*long.ids, *long.cut]) == f"Count.{' one' * 40}<|endoftext|>"


def _wrapped(llama: Any) -> Any:
    import copy

    import peft

    return peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(r=1, target_modules=["q_proj"]))


def test_packed_rows_are_told_apart(llama: Any) -> None:
    asked = recipe(ROWS[:1] * 3 + [{"prompt": "x", "completion": " y"}] * 3, "sft", "packing=true", "max_length=64")
    found, batch = preview(asked, 1), batches_of(asked, llama)[0]
    part = found.shown[0].parts[0]
    starts = [i for i, n in enumerate(batch["position_ids"][0].tolist()) if n == 0 and i]
    assert (
        list(part.ids) == batch["input_ids"][0].tolist()[: len(part.ids)]
        and list(part.starts) == starts[: len(part.starts)]
    )
    assert part.starts and not any(part.learned[i] for i in (0, *part.starts)) and found.packed


# ---- the screen -----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def letters(text: str, learned: int, cut: str = "") -> Preview:
    part = Part("", tuple(map(ord, text)), tuple(i >= learned for i in range(len(text))), cut=tuple(map(ord, cut)))
    return Preview(Letters(), (Shown((part,), ("label: \x1b[2J",)),), {}, {})


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colour", [True, False])
def test_lines_fit_the_screen_and_obey_nothing(width: int, colour: bool) -> None:
    text = "a\x1b[31mb\x9b5m\r\u202e" + "语言模型 e\u0301 " * 90 + "\n\n" + "word " * 90
    for full in (True, False):
        shown = told(letters(text, 40, "cut off " * 40), Screen(width, colour, full=full))
        plain = re.sub(r"\x1b\[(?:1;32|9;31|2|0)m", "", shown) if colour else shown
        assert all(c.isprintable() or c == "\n" for c in plain)
        assert max(sum(map(cells, line)) for line in plain.split("\n")) <= width
        body = plain.replace("\n  ", "").translate(str.maketrans("", "", "⟦⟧⟪⟫"))
        assert ("语言模型 e\u0301 " * 90 in body) == full and "\\x1b[31mb\\x9b5m\\r\\u202e" in body
        if colour:  # nothing stays on at the end of a line
            assert all(line.count("\x1b[0m") * 2 == line.count("\x1b[") for line in shown.split("\n"))
        else:
            assert shown.count("⟦") == shown.count("⟧") > 1 and shown.count("⟪") == shown.count("⟫") > 1


def test_marks_without_colour_or_other_letters() -> None:
    assert "  ab[[cd]]<<ef>>" in told(letters("abcd", 2, "ef"), Screen(80, unicode=False)).split("\n")
    assert "  ab⟦cd⟧⟪ef⟫" in told(letters("abcd", 2, "ef"), Screen(80)).split("\n")
    assert harmless("é 你\n\t\ud800") == "é 你\n\\t\\ud800"


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(ROWS)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["preview", "r.yaml", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "row 2" in out and "row 3" not in out and "copies of other rows" in out and "\x1b" not in out
    assert "left out: they have no label left within max_length: 24" in out and "d.jsonl, line 4" in out
    assert max(map(len, out.split("\n"))) <= 80
    assert main(["preview", "r.yaml", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["counts"]["training"]["cut"] == 3 and len(made["rows"]) == 3
    assert main(["preview", "r.yaml", "--fulll"]) == 2 and "'--full'" in capsys.readouterr().err
    assert main(["preview", "r.yaml", "--rows", "0"]) == 2 and "a whole number from 1 to" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["multi_label", "seq2seq", "grpo", "image_classification", "masked_lm"])
@pytest.mark.slow
def test_every_kind_of_rows_has_a_preview(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", name, "max_train_samples=8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 3 and all(row["facts"] or any(any(p["learned"]) for p in row["parts"]) for row in rows)
