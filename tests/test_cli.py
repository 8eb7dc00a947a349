"""The command line on real input: the shipped model and data, a few steps at a time."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.integrations.files import digest_of
from layerpeft.recipe import outcome, shipped
from layerpeft.recipe.comparing.arms import Arm, parse_arms
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.samples import generate, prompt_of
from layerpeft.recipe.tasks.metrics import class_metrics
from layerpeft.recipe.train import run
from layerpeft.recipe.trainer import first_batches, load_model, prepare, wrap
from layerpeft.saving import owned
from layerpeft.saving.card import GAP
from tests.helpers.hub import standing_in, talk_to
from tests.helpers.processes import without_the_package
from tests.helpers.short import LAYERS, short_llama

pytestmark = pytest.mark.usefixtures("shallow")

TINY = ["max_steps=2", "max_train_samples=8", "max_eval_samples=4", "per_device_train_batch_size=2", "sample_tokens=4"]
TINY += ["logging_steps=1", "layerpeft.r=2", "num_train_epochs=1"]
SHORT = f"model_name_or_path={short_llama()}"  # five layers of twelve
THREE = "layerpeft.select.keep=3"
BRIEF = ['columns={text: "{answer}"}', "max_length=48", SHORT]  # rows of a third of their length


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def tiny(name: str, *more: str) -> list[str]:
    text = shipped.recipes()[name].read_text()
    weights = "method: full" in text or "method: head" in text  # have no rank
    return [name, f"output_dir=out-{name}", *(t for t in TINY if not (weights and t == "layerpeft.r=2")), *more]


# ---- small commands -------------------------------------------------------------------------------------------------


def test_recipes_list_show_copy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in shipped.recipes())
    assert main(["recipes", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {item["name"]: item["command"] for item in listed}["quickstart"] == "layerpeft train quickstart"
    assert all(item["about"].endswith(".") for item in listed)  # whole sentences
    about = {item["name"]: item["about"] for item in listed}
    assert about["ir_tuning_gsm8k"].endswith("chosen again every 10 steps, frozen layers measured as well.")
    assert about["soft"] == "SoFT (arXiv 2309.08968): sorted fine-tuning."
    assert main(["recipes", "show", "telly"]) == 0
    assert capsys.readouterr().out == shipped.recipes()["telly"].read_text()
    assert main(["recipes", "copy", "telly"]) == 0
    assert (place / "telly.yaml").read_text() == shipped.recipes()["telly"].read_text()
    assert main(["recipes", "copy", "telly"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["recipes", "copy", "telly", "mine.yaml"]) == 0
    assert (place / "mine.yaml").is_file()


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["devices"]
    assert main(["env"]) == 0
    assert f"torch          {torch.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["trian", "x.yaml"], ["unknown command 'trian'", "layerpeft train"]),
        (["quickstart"], ["Did you mean `layerpeft train quickstart`?"]),
        (["chat", "out"], ["Did you mean `layerpeft generate FOLDER --chat`?"]),
        (["show", "lisa"], ["Did you mean `layerpeft recipes show NAME`?"]),
        (["train"], ["name a recipe", "quickstart"]),
        (["train", "quickstrat"], ["Did you mean 'quickstart'?"]),
        (["train", "."], ["is a folder"]),
        (["train", "quickstart", "--learning_rate", "1e-4"], ["learning_rate=1e-4"]),
        (["plan", "quickstart", "--fit", "1MB", "--json", "layerpeft.selct=last:2"], ["Did you mean 'select'?"]),
        (["train", "quickstart", "oops"], ["'oops' is not of the form key=value"]),
        (["train", "quickstart", "layerpeft.selct=last:2"], ["command line", "Did you mean 'select'?"]),
        (["recipes", "shwo"], ["Did you mean 'show'?"]),
        (["recipes", "show"], ["name a recipe"]),
        (["recipes", "show", "quickstat"], ["Did you mean 'quickstart'?"]),
        (["env", "more"], ["unknown argument 'more'"]),
        (["compare", "quickstart", "--arms", "rnd,all:3"], ["2 problems", "unknown arm 'rnd'", "'all:3'"]),
        (["compare", "quickstart", "--seeds", "many"], ["--seeds", "'many'"]),
        *(
            (["compare", "quickstart", "--seeds", n], ["whole number from 1 to 9,999", f"'{n}'"])
            for n in ("0", "-1", "nan")
        ),
        *(
            (["compare", "quickstart", "--rates", n], [n, "above 0 and up to 1,000,000"])
            for n in ("1e400", "nan", "x1e400")
        ),
        (["compare", "quickstart", "--budget", f"memory={'9' * 400}GB"], ["is no amount above 0; write memory=24GB"]),
        (["compare", "quickstart", "--budget", "time=1e400"], ["is no amount above 0"]),
        (["compare", "quickstart", "--arms", f"random:{'9' * 5000}"], ["has no whole number from 1 to 9,999"]),
        (["plan", "quickstart", "--fit", f"{'9' * 400}GB"], ["is no size"]),
        *((["plan", "quickstart", "--processes", n], ["expected a whole number from 1"]) for n in ("0", "1e400", "-3")),
        *(
            (["preview", "quickstart", "--rows", n], ["expected a whole number from 1"])
            for n in ("0", "inf", "9" * 5000)
        ),
        *(
            (["predict", "x", "y", "--out", "o.csv", "--threshold", n], ["between 0 and 1"])
            for n in ("nan", "1e400", "0", "-1")
        ),
        *(
            (["predict", "x", "y", "--out", "o.csv", "--batch-size", n], ["--batch-size", "from 1"])
            for n in ("0", "nan")
        ),
        *((["eval", "x", "y", "--batch-size", n], ["--batch-size", "from 1"]) for n in ("-1", "1.5")),
        *((["eval", "x", "y", f"temperature={n}"], ["temperature: expected"]) for n in (".nan", "1e400", "-1")),
        (
            ["generate", "x", "top_p=1.5", "repetition_penalty=.inf"],
            ["top_p: expected a number from 0 to 1", "2 problems"],
        ),
        *((["train", "quickstart", f"seed={n}"], ["seed: expected"]) for n in ("-1", "4294967296", ".nan")),
        (["score", "last_layers"], ["chooses by place", "gradient_norm"]),
        (["compare", "quickstart", "layerpeft.select=all"], ["trains all 5 layers", "no choice to compare"]),
    ],
)
def test_wrong_command_lines(words: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    for fragment in fragments:
        assert fragment in said.err
    assert "Traceback" not in said.err and said.out == ""


def test_help_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out


# ---- train ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.pictures
def test_train_writes_what_loads_everywhere(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *tiny("quickstart", "warmup_ratio=0")]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("trainable params: ")
    assert "note: warmup_ratio is read as warmup_steps" in said.err
    assert any(line.startswith("held-out loss: ") for line in lines)
    assert "before:" in lines and "after:" in lines and any("layerpeft compare" in line for line in lines)
    folder = place / "out-quickstart"
    names = {p.name for p in folder.iterdir()}
    assert {
        "adapter_model.safetensors",
        "layerpeft.json",
        "layers.csv",
        "layers.png",
        "recipe.yaml",
        "log.jsonl",
    } <= names
    assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 0 and "eval_loss" in log[0] and any("loss" in record for record in log)
    base = shipped.resolve("layerpeft://llama-6m")
    ids = torch.arange(100, 140)[None]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder)
    ).eval()
    ours = layerpeft.load(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, ours(ids).logits, atol=1e-5)
    report = layerpeft.layer_report(ours)
    assert [row.layer for row in report.rows if row.steps] == [row.layer for row in report.rows if row.chosen]
    assert sum(row.chosen for row in report.rows) == 2
    again = load_recipe(str(folder / "recipe.yaml"), ["output_dir=again"])
    assert again.values["max_steps"] == 2 and again.values["warmup_steps"] == 0 and again.block["r"] == 2


def test_the_choice_is_that_of_score_layers_on_the_first_batches(place: Path) -> None:
    recipe = load_recipe(*_split(tiny("quickstart", THREE, SHORT)))
    setup = prepare(recipe)
    model = load_model(setup)
    batches, setup = first_batches(setup, model, 8)
    scores = layerpeft.score_layers(model, "gradient_norm", batches=batches, target_modules="all-linear", num_batches=8)
    result = run(recipe, say=lambda text: None)
    assert {row.layer for row in result.report.rows if row.chosen} == set(scores.ranked()[:3])
    assert setup.ready and "labels" in setup.train.column_names


def test_classification_trains_its_head(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "train",
                *tiny("revision", "layerpeft.select=last:2", 'columns={text: "{after}", label: "{coarse}"}', SHORT),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "macro-F1: " in text and "accuracy: " in text
    labels = json.loads((place / "out-revision" / "labels.json").read_text())
    assert labels == {"0": "content", "1": "surface"}
    loaded = layerpeft.load(place / "out-revision", num_labels=2)
    trained = loaded.base_model.model.score.modules_to_save["default"].weight
    assert trained.shape == (2, 192)
    fresh = load_model(
        prepare(load_recipe(*_split(tiny("revision", 'columns={text: "{after}", label: "{coarse}"}', SHORT)), "score"))
    )
    assert not torch.equal(trained, fresh.score.weight.to(trained.dtype))
    assert "layerpeft merge out-revision out-revision-merged " in text
    assert main(["merge", "out-revision", "out-revision-merged"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(place / "out-revision-merged")
    assert torch.equal(merged.score.weight, trained)
    names = {0: "content", 1: "surface"}
    plain = layerpeft.load(place / "out-revision")
    assert plain.config.id2label == merged.config.id2label == names and plain.config.label2id["surface"] == 1
    given = AutoModelForSequenceClassification.from_pretrained(str(short_llama()), num_labels=2)
    assert layerpeft.load(place / "out-revision", given).config.id2label == names
    guess = pipeline("text-classification", model=str(place / "out-revision-merged"))
    assert {found["label"] for found in guess(["A word.", "Another one, and longer."], batch_size=2)} <= {
        "content",
        "surface",
    }
    (place / "old").mkdir()
    for path in (place / "out-revision").glob("*.*"):  # as folders were written before the record knew of classes
        shutil.copy(path, place / "old")
    manifest = json.loads((place / "old" / "layerpeft.json").read_text())
    del manifest["head"]
    manifest["sha256"] = digest_of(manifest)
    (place / "old" / "layerpeft.json").write_text(json.dumps(manifest))
    assert layerpeft.load(place / "old").config.id2label == names
    code = (
        "import sys; sys.modules['layerpeft'] = None; import peft, transformers; folder, base = sys.argv[1:]\n"
        "base = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)\n"
        "print(peft.PeftModel.from_pretrained(base, folder).base_model.model.score.modules_to_save['default'].weight.sum().item())"
    )
    there = without_the_package(code, place / "out-revision", str(short_llama()))
    assert there.returncode == 0 and float(there.stdout) == pytest.approx(trained.sum().item(), abs=1e-4), there.stderr


def test_all_layers_is_plain_lora(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *tiny("quickstart", "layerpeft.select=all", *BRIEF)]) == 0
    text = capsys.readouterr().out
    assert not (place / "out-quickstart" / "layerpeft.json").exists()
    assert "are fewer layers enough?" in text and "layerpeft.load" not in text


def test_chat_rows_packed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows as a conversation, packed: measuring and training read the same prepared rows."""
    chat = 'columns={system: "Be brief.", user: "{question}", assistant: "{answer}"}'
    more = [
        "packing=true",
        "attn_implementation=eager",
        "layerpeft.select.num_batches=2",
        "max_length=64",
        "warmup_steps=0",
    ]
    assert main(["train", *tiny("quickstart", chat, *more)]) == 0
    assert "system: Be brief." in capsys.readouterr().out
    rows = layerpeft.layer_report(layerpeft.load(place / "out-quickstart")).rows
    assert {row.steps for row in rows if row.chosen} == {2}


@pytest.mark.slow  # as tests/recipe/test_shipped.py has it of a recipe of each kind
def test_resume_goes_on_with_the_same_choice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tiny("quickstart", *BRIEF, "max_steps=4", "save_strategy=steps", "save_steps=2")
    assert main(["train", *whole]) == 0
    weights = (place / "out-quickstart" / "adapter_model.safetensors").read_bytes()
    half = place / "out-quickstart" / "checkpoint-4"
    for path in half.iterdir():  # as if the run had been cut short while it wrote its last checkpoint
        if path.name != "adapter_config.json":
            path.unlink()
    assert main(["train", *whole]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["train", *whole, "resume_from_checkpoint=true", "layerpeft.select.keep=2"]) == 2
    assert "(keep: {'time': '75%', 'length': 48} there, 2 here)" in capsys.readouterr().err
    assert main(["train", *whole, "resume_from_checkpoint=true"]) == 0
    assert (place / "out-quickstart" / "adapter_model.safetensors").read_bytes() == weights
    report = layerpeft.layer_report(layerpeft.load(place / "out-quickstart"))
    assert report.by == "gradient_norm" and {row.steps for row in report.rows if row.chosen} == {3}
    assert main(["train", *whole, "overwrite_output_dir=true", "save_strategy=no"]) == 0
    assert not list((place / "out-quickstart").glob("checkpoint-*"))


def test_own_csv_rows_and_no_held_out_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "rows.csv").write_text("text\n" + "a sentence to learn\n" * 8)
    words = tiny("last_layers", "dataset_name=rows.csv", "eval_dataset=null", "columns=null")
    assert main(["train", *words]) == 0
    assert "no held-out rows" in capsys.readouterr().out
    assert main(["compare", *words, "output_dir=other"]) == 2
    assert "eval_dataset: missing" in capsys.readouterr().err


@pytest.mark.pictures
def test_wandb_offline_gets_the_layer_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(place))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: dict[str, object] = {}
    log = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, data, *a, **k: (logged.update(data), log(run, data, *a, **k)))
    assert main(["train", *tiny("last_layers", *BRIEF, "report_to=wandb", "run_name=test")]) == 0
    wandb.finish()
    assert {"layers/table", "layers/picture"} <= set(logged)
    assert list(place.glob("wandb/offline-run-*"))


def test_the_finished_folder_is_pushed_where_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "PLANNED", 0.0)
    with standing_in() as hub:
        talk_to(hub, monkeypatch)
        asked = ["push_to_hub=true", "hub_model_id=me/mine", "hub_token=secret", "save_strategy=no"]
        assert main(["train", *tiny("quickstart", *BRIEF, *asked)]) == 0
    folder, arrived = place / "out-quickstart", hub.repositories["me/mine"]
    left = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != owned.RECORD}
    assert left.keys() <= arrived.keys() and all(arrived[name] == data for name, data in left.items())
    assert "Bearer secret" in hub.tokens and "secret" not in (folder / "recipe.yaml").read_text()
    card = arrived["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card and "## Recipe" in card and GAP not in card
    absolute = [word for word in re.findall(r"(?<![\w.:/])/[\w.-]+/[\w./-]+", card) if "huggingface.co" not in word]
    assert not absolute and str(place) not in card and "report.html" in arrived
    for name in ("README.md", "run.json", "report.html"):
        assert str(short_llama()).encode() not in arrived[name] and b"model_name_or_path: llama" in arrived[name]
    memory = json.loads(arrived["run.json"])["memory"]
    planned, measured = memory["planned"], memory["measured"]
    assert planned["activations"] > 0 and measured["peak of the process"] > measured["weights"]
    for part in ("weights", "gradients", "optimizer"):
        assert planned[part] == pytest.approx(measured[part], rel=0.01), part


def test_a_quantized_base_is_measured_and_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    four = "model_init_kwargs={quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4}}"
    assert main(["train", *tiny("quickstart", four, THREE, *BRIEF)]) == 0
    rows = layerpeft.layer_report(layerpeft.load(place / "out-quickstart")).rows
    assert sum(row.chosen for row in rows) == 3 and all(row.score for row in rows)


# ---- score ----------------------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_score_is_reused_by_train(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *tiny("quickstart", THREE, *BRIEF), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    folder = place / "out-quickstart"
    assert {p.name for p in folder.iterdir()} == {"scores.json", "scores.csv", "scores.png"}
    scores = layerpeft.Scores.load(folder / "scores.json")
    assert list(scores.values) == found["scores"]["values"]
    assert found["layers"] == sorted(scores.ranked()[:3])
    by = "layerpeft.select={by: out-quickstart/scores.json, keep: 2}"
    assert main(["train", *tiny("quickstart", by, *BRIEF)]) == 0
    rows = layerpeft.layer_report(layerpeft.load(folder)).rows
    assert [row.layer for row in rows if row.chosen] == sorted(scores.ranked()[:2])


def test_score_prints_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *tiny("outliers", *BRIEF)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "name", "outliers", "chosen"]
    assert sum(line.endswith("yes") for line in lines) == 3


# ---- compare --------------------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_compare(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *tiny("quickstart", THREE, *BRIEF), "--arms", "random:2,last,all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    arms = {item["arm"]: item for item in found["runs"]}
    assert list(arms)[0] == "gradient_norm" and len(arms) == 5
    assert arms["last"]["layers"] == [2, 3, 4] and arms["all"]["layers"] == list(range(LAYERS))
    drawn = [item for name, item in arms.items() if name.startswith("random:")]
    assert [len(item["layers"]) for item in drawn] == [3, 3] and drawn[0]["layers"] != drawn[1]["layers"]
    assert {item["trainable"] for item in found["runs"] if item["arm"] != "all"} == {arms["last"]["trainable"]}
    assert 3 * arms["all"]["trainable"] == LAYERS * arms["last"]["trainable"]
    verdict = found["verdict"]
    assert verdict["kind"] == "unknown" and verdict["sentence"].endswith("over 4 held-out rows, too few to judge by.")
    assert found["before"] > 0 and len({item["value"] for item in found["runs"]}) == 5
    folder = place / "out-quickstart"
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((folder / "compare.json").read_text())
    assert written["runs"] == found["runs"] and "gradient_norm" in written["recipe"]
    assert {p.name for p in folder.iterdir()} == {"compare.json", "compare.jsonl", "compare.png", "report.html"}
    alone = run(
        load_recipe(*_split(tiny("quickstart", THREE, *BRIEF))), say=lambda text: None
    )  # beside what compare has written
    assert alone.after["eval_loss"] == found["runs"][0]["value"] and alone.before["eval_loss"] == found["before"]


def test_arms_share_start_and_order_of_rows(place: Path) -> None:
    """Two arms of a comparison see the same batches, and start from the same loss."""
    recipe = load_recipe(*_split(tiny("quickstart", THREE, *BRIEF)), "compare")
    setup = prepare(recipe)
    seen = []
    for layers in ([0], [3, 4]):
        model = wrap(setup, load_model(setup), {"layers": layers}, None)
        batches, _ = first_batches(setup, model, 4)
        with torch.no_grad():
            seen.append(([b["input_ids"] for b in batches], [float(model.eval()(**b).loss) for b in batches]))
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], seen[1][0], strict=True))
    assert seen[0][1] == seen[1][1]


def test_arms_are_read() -> None:
    assert parse_arms("random:3,last,all") == (Arm("random", 3), Arm("last"), Arm("all"))
    assert parse_arms("random, first", draws=5) == (Arm("random", 5), Arm("first"))
    assert parse_arms("last:2,snr,snr:3,lisa") == (
        Arm("last", keep=2),
        Arm("snr"),
        Arm("snr", keep=3),
        Arm("lisa", source="lisa"),
    )
    for text in ("", "random:0", "all:2", "lisa:2", "random,random", "none", "random:x", "depth", "no/such.yaml"):
        with pytest.raises(RecipeError, match="--arms"):
            parse_arms(text)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def test_class_metrics_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(0, 5, (200,), generator=generator).tolist()
    wanted = torch.randint(1, 7, (200,), generator=generator).tolist()
    ours = class_metrics(found, wanted)
    assert ours["macro_f1"] == pytest.approx(metrics.f1_score(wanted, found, average="macro", zero_division=0))
    assert ours["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, found))
    assert class_metrics([0, 0, 1], [0, 1, 1]) == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(2 / 3)}


def test_prompts_of_every_form_of_row() -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert prompt_of({"prompt": "a", "completion": "b"}) == ("a", "b")
    assert prompt_of({"prompt": chat[:1], "completion": chat[1:]}) == (chat[:1], "Ho")
    assert prompt_of({"messages": chat}) == (chat[:1], "Ho")
    assert prompt_of({"text": "one two three four"}) == ("one two", "three four")
    assert prompt_of({"input_ids": [1, 2]}) is None


def test_generate_leaves_the_model_in_its_mode(place: Path) -> None:
    setup = prepare(load_recipe(*_split(tiny("last_layers"))))
    model = load_model(setup)
    for training in (True, False):
        model.train(training)
        chat = [{"role": "user", "content": "Hello"}]
        assert generate(model, setup.tokenizer, "The sun", 3) == generate(model, setup.tokenizer, "The sun", 3)
        assert isinstance(generate(model, setup.tokenizer, chat, 3), str)
        assert model.training is training


def _split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]
