"""Rows of tasks: what is wrong with them is said before weights load, and what they name keeps its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.rows import Unfit
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.tasks import answers, audio, metrics, raw_text, tagging
from layerpeft.recipe.toys.sounds import wav
from layerpeft.recipe.train import run
from layerpeft.recipe.trainer import Setup, make_trainer, prepare
from tests.helpers.tiny import SIZES, TASKS

RECIPE = """
trainer: {trainer}
model_name_or_path: layerpeft://{model}
dataset_name: rows.{kind}
output_dir: out
use_cpu: true
layerpeft: {{method: lora, select: last:1, r: 2, target_modules: all-linear}}
"""
MODELS = {"image_classification": "toy-vit", "speech": "toy-wav2vec2", "seq2seq": "toy-t5"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def setup_of(
    trainer: str, *rows: dict[str, Any] | str, held_out: tuple[dict[str, Any], ...] = (), more: str = ""
) -> Setup:
    """What becomes of rows (JSON, or lines of a CSV)."""
    kind = "csv" if isinstance(rows[0], str) else "jsonl"
    Path(f"rows.{kind}").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    if held_out:
        Path("other.jsonl").write_text("\n".join(map(json.dumps, held_out)) + "\n")
        more += "eval_dataset: other.jsonl\n"
    text = RECIPE.format(trainer=trainer, model=MODELS.get(trainer, "toy-bert"), kind=kind) + more
    Path("r.yaml").write_text(text)
    return prepare(load_recipe("r.yaml"))


TAGGED = {"tokens": ["Ana", "left"], "tags": ["B-PER", "O"]}
ASKED = {"question": "who ?", "context": "Ana left . Ben left .", "answer": "Ben"}
BROKEN: dict[str, tuple[str, list[Any], list[str]]] = {
    "fewer tags": (
        "token_classification",
        [TAGGED, {"tokens": ["Ana", "left"], "tags": ["O"]}],
        ["rows.jsonl, line 2: row 2 has 2 words and 1 tags (tags)"],
    ),
    "no tag": (
        "token_classification",
        [TAGGED, {"tokens": ["a", "b"], "tags": ["O", None]}],
        ["row 2 has no tag (tags) for its word 2 ('b')"],
    ),
    "no word": (
        "token_classification",
        [TAGGED, {"tokens": ["a", ""], "tags": ["O", "O"]}],
        ["tokens, number 2) that is empty"],
    ),
    "not there": (
        "question_answering",
        [ASKED, ASKED | {"answer": "Carla"}],
        ["row 2 has an answer (answer) that is not in its context: 'Carla'"],
    ),
    "elsewhere": (
        "question_answering",
        [{**ASKED, "answers": {"text": ["Ben"], "answer_start": [0]}}],
        ["row 1 has an answer_start of 0, where its context has 'Ana', and not 'Ben'"],
    ),
    "none": ("question_answering", [ASKED | {"answer": None}], ["answers: no training row has an answer"]),
    "kinds": (
        "classification",
        ["text,label", "a,0.5", "b,late"],
        ["labels are of different kinds: rows.csv, line 3: row 2 has the label late"],
    ),
    "twice": ("classification", [{"text": "a", "label": ["x", "x"]}], ["row 1 has the label x twice"]),
    "no target": ("seq2seq", [{"source": "one", "target": None}], ["row 1 has no target"]),
    "no column": ("masked_lm", [{"words": "one"}], ["the rows need `text`, and have words", "columns:"]),
    "no file": (
        "image_classification",
        [{"image": "a.png", "label": "x"}],
        ["row 1 names a file that is not there (image): a.png"],
    ),
    "no sound": ("speech", [{"audio": "data:;base64,aGFsbG8=", "text": "a"}], ["row 1 has a sound that"]),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_rows_that_do_not_fit_are_named_before_weights_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, rows, wanted = BROKEN[name]
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(lambda *_, **__: pytest.fail()))
    with pytest.raises(RecipeError) as error:
        setup_of(trainer, *rows)
    assert [said for said in wanted if said not in str(error.value)] == [], str(error.value)


def test_classes_that_no_training_row_has_are_named_with_their_rows() -> None:
    strange = {"tokens": ["Oslo"], "tags": ["B-LOC"]}
    with pytest.raises(RecipeError, match=r"eval_dataset: tags: .*: B-LOC \(other.jsonl, line 2\)"):
        setup_of("token_classification", TAGGED, held_out=(TAGGED, strange))
    with pytest.raises(RecipeError, match="the label late, and training rows have numbers"):
        setup_of("classification", "text,label", "a,0.5", "b,1.5", held_out=({"text": "c", "label": "late"},))


def test_what_labels_are_follows_from_the_rows() -> None:
    many = setup_of("classification", {"text": "a", "label": ["y", "x"]}, {"text": "b", "label": []})
    assert many.labels == ("x", "y") and list(many.train["labels"]) == [[1.0, 1.0], [0.0, 0.0]]
    number = setup_of("classification", "text,label", "a,1", "b,2.5")
    assert number.learned.values == {"problem_type": "regression"} and list(number.train["labels"]) == [1.0, 2.5]
    whole = ("classification", "text,label", "a,1", "b,2")
    assert setup_of(*whole).labels == ("1", "2")
    asked = setup_of(*whole, more="model_init_kwargs: {problem_type: regression}\n")
    assert list(asked.train["labels"]) == [1.0, 2.0] and asked.measure == "eval_loss"
    written = setup_of("token_classification", "tokens,tags", '"[""Ana"", ""left""]","B-PER O"')
    assert written.labels == ("O", "B-PER") and list(written.train["labels"]) == [[-100, 1, 0, -100]]


def test_a_word_learns_by_its_first_token_whatever_a_tokenizer_makes_of_blanks() -> None:
    for name in ("toy-bert", "llama-6m"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(resolve(f"layerpeft://{name}"))
        made = tagging.words_as_tokens(["Ana", "Zwqx", "left"], tokenizer, None)
        assert {w for w in made.word_ids() if w is not None} == {0, 1, 2}
        assert made["input_ids"] == tokenizer("Ana Zwqx left")["input_ids"], name


def test_windows_hold_every_token_and_the_answer_where_it_is() -> None:
    facts = " ".join(f"Ana keeps {i} coins ." for i in range(40))
    start = facts.index("33")
    row = {"question": "how many ?", "context": facts, "answers": {"text": ["33"], "answer_start": [start]}}
    setup = setup_of("question_answering", row, more="max_length: 48\nstride: 12\n")
    windows = list(setup.train)
    assert len(windows) > 4 and all(len(w["input_ids"]) <= 48 for w in windows)
    read = {c for w in windows for a, b in w["offsets"] for c in range(a, b) if a >= 0}
    assert read >= {i for i, c in enumerate(facts) if c != " "}
    held = [w for w in windows if w["end_positions"]]
    assert held and all(
        facts[w["offsets"][w["start_positions"]][0] : w["offsets"][w["end_positions"]][1]] == "33" for w in held
    )
    window = held[0]
    starts, ends = (np.full(len(window["input_ids"]), -5.0) for _ in range(2))
    starts[window["start_positions"]] = ends[window["end_positions"]] = 5.0
    found = [answers.best(starts, ends, window["offsets"])]
    assert answers.answer(facts, found, True) == "33"
    starts[0] = ends[0] = 9.0
    found = [answers.best(starts, ends, window["offsets"])]
    assert answers.answer(facts, found, True) == "" and answers.answer(facts, found, False) == "33"


def test_masks_hang_on_seed_epoch_and_rows_alone_and_those_of_held_out_rows_stay() -> None:
    rows = [{"text": f"Ana moved to Oslo and Ben left Lima {i} times ."} for i in range(6)]
    setup = setup_of("masked_lm", *rows, held_out=tuple(rows))
    trainer = make_trainer(setup, transformers.AutoModelForMaskedLM.from_pretrained(resolve("layerpeft://toy-bert")))
    batch = [dict(row) for row in list(setup.train)[:4]]
    first, again = (trainer.data_collator([dict(r) for r in batch]) for _ in range(2))
    trainer.state.epoch = 1.0
    later = trainer.data_collator([dict(r) for r in batch])
    assert torch.equal(first["labels"], again["labels"]) and torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["labels"], later["labels"]) and (first["labels"] != -100).any()
    held = trainer.data_collator([dict(row) for row in setup.held_out])
    assert (held["labels"] != -100).any() and trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_texts_are_joined_into_blocks_and_lose_nothing() -> None:
    setup = setup_of("causal_lm", *({"text": f"Ana left Oslo {i}"} for i in range(9)), more="max_length: 16\n")
    words = setup.tokenizer
    whole = [t for row in setup.examples or () for t in words(row["text"])["input_ids"]]
    joined = [t for row in setup.train for t in row["input_ids"]]
    each = [words(f"Ana left Oslo {i}")["input_ids"] for i in range(9)]
    assert joined == [t for ids in each for t in ids] and not whole  # this tokenizer ends each text itself
    assert all(row["labels"] == row["input_ids"] and len(row["input_ids"]) <= 16 for row in setup.train)


def test_a_sound_keeps_its_pitch_at_another_rate() -> None:
    time = np.arange(8000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    found = audio.sound({"bytes": wav(tone, 8000), "path": None}, 16_000)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert len(found) == 16_000 and np.abs(found - wanted)[200:-200].max() < 1e-3
    high = np.sin(2 * np.pi * 7000 * np.arange(16_000) / 16_000)  # above what the lower rate can hold
    assert np.abs(audio.resampled(high.astype("float32"), 16_000, 8000)[200:-200]).max() < 2e-2
    with pytest.raises(Unfit, match="without samples"):
        audio.sound({"bytes": wav(np.zeros(0)), "path": None}, 16_000)


def test_no_row_is_longer_than_the_model_has_places_for() -> None:
    rows = [{"text": "Ana left Oslo . " * 200, "label": "x"}, {"text": "Ana", "label": "y"}]
    setup = setup_of("classification", *rows)  # max_length is 512 by default, and this model has 256 places
    assert [len(ids) for ids in setup.train["input_ids"]] == [256, 3] and setup.counts["training"].cut == 1


@pytest.mark.slow
def test_a_model_that_spells_has_its_letters_where_it_is_loaded_and_merged() -> None:
    run(load_recipe("speech", [*SIZES, "output_dir=out", "save_strategy=no"]), lambda said: None)
    loaded = layerpeft.load("out").eval()
    assert main(["merge", "out", "merged"]) == 0
    merged = transformers.AutoModelForCTC.from_pretrained("merged").eval()
    sound = torch.randn(1, 8000)
    with torch.no_grad():
        torch.testing.assert_close(merged(sound).logits, loaded(sound).logits, atol=1e-4, rtol=1e-4)
    assert merged.config.vocab_size == len(transformers.AutoProcessor.from_pretrained("merged").tokenizer)
    heard = transformers.pipeline("automatic-speech-recognition", "merged")(
        {"raw": sound[0].numpy(), "sampling_rate": 16_000}
    )
    assert set(heard["text"]) <= set("abcdefg ")


@pytest.mark.slow
def test_each_task_has_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TASKS:
        assert main(["plan", name]) == 0, name
        assert "backward pass:" in capsys.readouterr().out


def test_numbers_by_hand() -> None:
    assert metrics.entities(["B-A", "I-A", "B-A", "O", "I-B", "I-A"]) == {
        ("A", 0, 1),
        ("A", 2, 2),
        ("B", 4, 4),
        ("A", 5, 5),
    }
    assert metrics.entities(["B-A", "E-A", "S-B"]) == {("A", 0, 1), ("B", 2, 2)}
    assert metrics.edits("kitten", "sitting") == 3 and metrics.edits([], [1, 2]) == 2
    rates = metrics.error_rates(["a cat", "dog"], ["the cat", "dog runs"])
    assert rates["wer"] == 2 / 4
    both = metrics.answer_metrics(["The red box!", ""], [["red box", "box"], []])
    assert both == {"exact_match": 1.0, "f1": 1.0}
    some = metrics.label_metrics([[True, False], [True, True]], [[True, False], [False, True]])
    assert some == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1) / 2)}
    assert metrics.number_metrics([1.0, 3.0], [1.0, 2.0])["r2"] == -1.0
    assert raw_text.NEXT.measure(raw_text.head(None, None, None)) == "eval_loss"


def named(task: str, folder: str, given: Any) -> set[str]:
    found = transformers.pipeline(task, folder)(given)
    return {item.get("label", item.get("entity")) for item in found}


def test_labels_keep_their_names_from_a_table_to_a_pipeline_on_what_was_merged() -> None:
    rows = [
        "text,label",
        *(f"{'we ran' if i % 2 else 'snow fell'},{'pünktlich' if i % 2 else 'zu spät'}" for i in range(8)),
    ]
    setup_of("classification", *rows)
    run(load_recipe("r.yaml", [*SIZES, "save_strategy=no"]), lambda said: None)
    assert main(["merge", "out", "merged"]) == 0
    assert named("text-classification", "merged", "we ran") <= {"pünktlich", "zu spät"}
    config = json.loads(Path("merged/config.json").read_text())
    assert config["id2label"] == {"0": "pünktlich", "1": "zu spät"}
    assert json.loads(Path("out/layerpeft.json").read_text())["task"] == {"trainer": "classification"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "given"),
    [
        ("token_classification", "token-classification", "Ana left Oslo"),
        ("multi_label", "text-classification", "it rained all day"),
        ("image_classification", "image-classification", None),
    ],
)
def test_every_head_with_names_prints_them_after_a_merge(name: str, task: str, given: Any) -> None:
    run(
        load_recipe(name, [*SIZES, "output_dir=out", "save_strategy=no", "layerpeft.select=last:1"]),
        lambda said: None,
    )
    names = set(json.loads(Path("out/labels.json").read_text()).values())
    assert main(["merge", "out", "merged"]) == 0
    if given is None:
        given = str(Path(resolve("layerpeft://shapes_train.jsonl")).parent / "train" / "000.png")
    assert named(task, "merged", given) and named(task, "merged", given) <= names
