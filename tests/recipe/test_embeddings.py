"""A SentenceTransformer with every kind of config: it trains what was chosen and nothing else, plain PEFT and sentence-transformers
open it, it resumes; its losses, its rows and its numbers. All cells: `pytest -m "" tests/recipe/test_embeddings.py`."""

from __future__ import annotations

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.integrations.code import forget, kept_out
from layerpeft.recipe import trainer
from layerpeft.recipe.beside import losses
from layerpeft.recipe.init import Wanted, init
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.preview import preview
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.tasks import embeddings
from layerpeft.recipe.tasks.metrics import spearman
from layerpeft.recipe.train import run
from layerpeft.recipe.trainers import table
from tests.helpers.processes import without_the_package
from tests.helpers.tiny import SIZES, STEPS
from tests.recipe.test_shipped import moved, of_base, tensors, wanted
from tests.recipe.test_tasks import CONFIGS

there = pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="the extra `embeddings` is not installed")
QUICK = ("waiting",)
CELLS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS if name != "plain"]
TEXTS = ["where does Ana keep keys ?", "how many maps does Ben keep ?", "Ana keeps 4 keys in the attic ."]
OPENED = """
import json, sys; sys.modules["layerpeft"] = None
import peft, torch, transformers
from sentence_transformers import SentenceTransformer
folder, base, texts, same = sys.argv[1:]
texts = json.loads(texts)
opened = SentenceTransformer(folder, device="cpu")
names = [type(module).__name__ for module in opened]
assert names == ["Transformer", "Pooling"] and opened.get_max_seq_length() == 256, opened
model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base, dtype=torch.float32), folder).eval()
batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
plain = (hidden * mask).sum(1) / mask.sum(1)
vectors = opened.encode(texts, convert_to_tensor=True)
torch.testing.assert_close(vectors, plain, atol=1e-5, rtol=1e-5)
torch.save(vectors, same)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(config: str, *settings: str) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A trainer when it is done, the model's tensors from before, and what came of it."""
    held: list[Any] = []
    make = trainer.make_trainer

    def kept(setup: Any, model: Any, **changes: Any) -> Any:
        before = {of_base(n): p.detach().clone() for n, p in tensors(model)}
        held[:] = make(setup, model, **changes), before
        return held[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerpeft.recipe.train.make_trainer", kept)
        more = (*SIZES, "learning_rate=0.05", *CONFIGS[config], *settings)
        result = run(load_recipe("embeddings", more), lambda said: None)
    return held[0], held[1], result


@there
@pytest.mark.parametrize("config", CELLS)
def test_it_trains_what_was_chosen_opens_elsewhere_and_resumes(config: str, place: Path) -> None:
    whole = place / "whole"
    made, before, result = trained(config, f"output_dir={whole}")
    held, model = made.model, made.model.transformers_model
    record = json.loads((whole / "layerpeft.json").read_text())
    assert record["checks"]["end"].startswith("every chosen") and record["new_tensors"] == []
    assert record["task"] == {"trainer": "embeddings", "rows": ["anchor", "positive"]}
    assert set(result.after) == {"eval_loss", "eval_recall@1"} and all(row.steps <= STEPS for row in result.report.rows)
    assert moved(whole, before) == wanted(record, before)
    ours = held.encode(TEXTS, convert_to_tensor=True)
    base = dict(tensors(model.unload()))
    assert base and {n for n, t in base.items() if not torch.equal(t, before[n])} == set()

    # a process without the package: plain PEFT on the bare model, and sentence-transformers with its pooling
    if config != "nf4":  # over the base as it was loaded
        home = record["config"]["base_model_name_or_path"]
        done = without_the_package(OPENED, whole, home, json.dumps(TEXTS), place / "vectors")
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(place / "vectors"), ours, atol=1e-5, rtol=1e-5)
    parts = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "adapter_config.json")
    assert all((folder / name).is_file() for folder in (whole, whole / "checkpoint-1") for name in parts)

    with pytest.MonkeyPatch.context() as patch:  # as in every process but the first
        patch.setattr(type(made.args), "should_save", False)
        made._save(str(place / "nothing"))
    assert not (place / "nothing").exists()

    again = place / "again"
    shutil.copytree(whole / "checkpoint-1", again / "checkpoint-1")
    trained(config, f"output_dir={again}", "resume_from_checkpoint=true")
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, again)]
    assert weights[0].keys() == weights[1].keys()
    assert {n for n, t in weights[0].items() if not torch.equal(t, weights[1][n])} == set()


@there
@pytest.mark.slow
def test_a_run_that_is_cut_off_in_its_second_epoch_goes_on_with_the_same_rows() -> None:
    more = ("num_train_epochs=3", "max_steps=-1", "max_train_samples=6", "save_steps=4", "batch_sampler=batch_sampler")
    trained("fixed", *more, "output_dir=whole")
    shutil.copytree("whole/checkpoint-4", "again/checkpoint-4")
    trained("fixed", *more, "output_dir=again", "resume_from_checkpoint=true")
    weights = [load_file(f"{folder}/adapter_model.safetensors") for folder in ("whole", "again")]
    assert {n for n, t in weights[0].items() if not torch.equal(t, weights[1][n])} == set()


@there
@pytest.mark.slow
def test_the_order_of_rows_hangs_on_data_seed_alone_and_held_out_rows_keep_theirs() -> None:
    def order(*settings: str) -> tuple[list[Any], list[Any]]:
        setup = trainer.prepare(load_recipe("embeddings", [*SIZES, "max_eval_samples=8", *settings]))
        made = trainer.make_trainer(setup, trainer.wrap(setup, trainer.load_model(setup), "last:1", None))
        loaders = made.get_train_dataloader(), made.get_eval_dataloader()
        return tuple([batch["anchor_input_ids"].tolist() for batch in loader] for loader in loaders)  # type: ignore[return-value]

    plain = "batch_sampler=batch_sampler"
    first, other = order("seed=1", "data_seed=5", plain), order("seed=2", "data_seed=5", plain)
    third = order("seed=1", "data_seed=6", plain)
    assert first == other and first[0] != third[0] and first[1] == third[1]


# ---- rows and losses ------------------------------------------------------------------------------------------------

ROWS: dict[tuple[str, ...], dict[str, Any]] = {
    losses.PAIR: {"anchor": "where ?", "positive": "here ."},
    losses.TRIPLE: {"anchor": "where ?", "positive": "here .", "negative": "there ."},
    losses.SCORED: {"sentence1": "it is here", "sentence2": "it is there", "score": 0.5},
    losses.ALIKE: {"sentence1": "it is here", "sentence2": "it is there", "label": 1},
    losses.CLASS: {"sentence": "it is here", "label": "place"},
}


def rows_of(form: tuple[str, ...], count: int = 12) -> str:
    """A file of such rows, each with words of its own."""
    draw, path = random.Random(0), Path(f"{'-'.join(form)}.jsonl")
    numbers = {"score": lambda: draw.random(), "label": lambda: draw.choice([0, 1])}
    rows = [
        {
            name: numbers[name]()
            if name in numbers and form != losses.CLASS
            else f"{value} {draw.choice(TEXTS)}"
            if name != "label"
            else draw.choice(["ü", "b"])
            for name, value in ROWS[form].items()
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


EACH = [(name, form) for name, forms in losses.LOSSES.items() for form in forms]
SOME = {"CosineSimilarityLoss", "BatchHardTripletLoss"}


@there
@pytest.mark.parametrize(
    ("name", "form"),
    [pytest.param(n, f, marks=() if n in SOME else pytest.mark.slow, id=f"{n}-{len(f)}-{f[-1]}") for n, f in EACH],
)
def test_every_loss_trains_on_the_rows_that_it_is_for(name: str, form: tuple[str, ...], place: Path) -> None:
    file = rows_of(form)
    more = [
        f"loss={name}",
        f"dataset_name={file}",
        f"eval_dataset={file}",
        "per_device_train_batch_size=6",
        "max_eval_samples=12",
    ]
    _, before, result = trained("waiting", *more, "save_strategy=no", "output_dir=out", "batch_sampler=batch_sampler")
    record = json.loads(Path("out/layerpeft.json").read_text())
    assert moved(place / "out", before) == wanted(record, before) and record["checks"]["end"].startswith("every chosen")
    measure = {"eval_spearman"} if form in (losses.SCORED, losses.ALIKE) else {"eval_recall@1"}
    assert set(result.after) == {"eval_loss"} | measure


@there
@pytest.mark.slow
def test_a_loss_of_several_widths_trains(place: Path) -> None:
    nested = "{MatryoshkaLoss: {loss: {MultipleNegativesRankingLoss: {scale: 10}}, matryoshka_dims: [64, 16]}}"
    _, before, _ = trained("fixed", f"loss={nested}", "output_dir=out")
    record = json.loads(Path("out/layerpeft.json").read_text())
    assert moved(place / "out", before) == wanted(record, before)


LOSSES = {
    "MultipleNegativesRankingLos": r"unknown loss .* Did you mean 'MultipleNegativesRankingLoss'\?",
    "GISTEmbedLoss": "GISTEmbedLoss needs more than rows: another model",
    "{CoSENTLoss: {scal: 3}}": r"CoSENTLoss: unknown option 'scal'. Did you mean 'scale'\?",
    "{TripletLoss: {triplet_margin: wide}}": "TripletLoss: triplet_margin: expected a number, got 'wide'",
    "{TripletLoss: {distance_metric: COSIN}}": "unknown distance_metric 'COSIN'. Did you mean 'COSINE'",
    "MatryoshkaLoss": "say the loss that it is of, and matryoshka_dims",
    "[1]": "loss: expected",
}


@there
@pytest.mark.parametrize("asked", LOSSES)
def test_a_loss_that_cannot_be_is_refused_with_the_recipe(asked: str) -> None:
    with pytest.raises(RecipeError, match=LOSSES[asked]):
        load_recipe("embeddings", [f"loss={asked}", "output_dir=out"])


@there
def test_a_loss_for_other_rows_is_refused_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerpeft.recipe.train.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    scored = rows_of(losses.SCORED)
    with pytest.raises(
        RecipeError, match=r"TripletLoss reads anchor \+ positive \+ negative, and the rows have anchor \+ pos"
    ):
        run(load_recipe("embeddings", ["loss=TripletLoss", "output_dir=out"]))
    with pytest.raises(RecipeError, match=r"eval_dataset: the rows have sentence1 .*, and those of training anchor"):
        run(load_recipe("embeddings", [f"eval_dataset={scored}", "output_dir=out"]))
    bad = [("b", 1), ("b", 0.7), (None, 1)]
    lines = [json.dumps({"sentence1": "a", "sentence2": text, "label": label}) + "\n" for text, label in bad]
    Path("bad.jsonl").write_text("".join(lines))
    with pytest.raises(
        RecipeError, match=r"(?s)line 2.*the label '0.7', which is neither 1 .* `score`.*line 3.*no sentence2"
    ):
        run(load_recipe("embeddings", ["dataset_name=bad.jsonl", "loss=null", "output_dir=out"]))
    with pytest.raises(
        RecipeError, match="embeddings trains in one process, or in several that hold the whole model each"
    ):
        load_recipe("embeddings", ["fsdp=full_shard", "output_dir=out"])


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = table.find_spec
    monkeypatch.setattr(table, "find_spec", lambda name: None if name == "sentence_transformers" else found(name))
    said = r"trainer: embeddings needs a package that is not installed \(pip install 'layerpeft\[embeddings\]'\)"
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe("embeddings", ["output_dir=out"])
    assert len(caught.value.problems) == 1


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_ranks_correlate_as_scipy_has_it_ties_among_them() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(3)
    one, other = ([draw.randint(0, 9) / 2 for _ in range(60)] for _ in range(2))
    assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert spearman([1, 2, 3], [2, 4, 9]) == pytest.approx(1) and spearman([1, 1, 1], [1, 2, 3]) == 0


def test_the_nearest_text_is_looked_for_among_all_and_a_copy_of_the_right_one_is_right() -> None:
    from datasets import Dataset

    at = {"a": 0.0, "b": 1.0, "c": 2.0, "near a": 0.1, "near b": 1.1, "between": 1.8}

    def vectors(texts: Any, column: str) -> torch.Tensor:
        angles = torch.tensor([at[text] for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    rows = Dataset.from_dict(
        {"anchor": ["a", "b", "a"], "positive": ["near a", "near b", "near a"], "negative": ["b", "c", "c"]}
    )
    assert embeddings.measured(rows, vectors) == {"recall@1": 2 / 3}  # b itself is nearer to b
    rows = Dataset.from_dict({"sentence": ["a", "near a", "b", "between", "c"], "label": [0, 0, 1, 2, 1]})
    assert embeddings.measured(rows, vectors) == {"recall@1": 1 / 2}  # what is alone in its class is left out
    rows = Dataset.from_dict(
        {"sentence1": ["a", "a", "a"], "sentence2": ["near a", "b", "c"], "label": [3.0, 2.0, 1.0]}
    )
    assert embeddings.measured(rows, vectors) == {"spearman": pytest.approx(1)}


@there
def test_a_merged_folder_opens_and_predict_and_eval_use_both(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet
    from sentence_transformers import SentenceTransformer

    _, _, result = trained("fixed", "output_dir=out", "save_strategy=no", "max_eval_samples=48")
    rows = [{"anchor": text, "other": n} for n, text in enumerate([*TEXTS, " "])]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["merge", "out", "merged"]) == 0
    assert main(["predict", "out", "rows.jsonl", "--out", "found.jsonl", "--keep", "other"]) == 0
    assert main(["predict", "merged", "rows.jsonl", "--column", "text={anchor}", "--out", "found.parquet"]) == 0
    wanted = SentenceTransformer("merged", device="cpu").encode(TEXTS, convert_to_tensor=True)
    lines = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert [line["other"] for line in lines] == [0, 1, 2, 3] and lines[3]["embedding"] is None and lines[3]["reason"]
    table = pyarrow.parquet.read_table("found.parquet")
    assert str(table.schema.field("embedding").type).startswith("list<") and "float" in str(
        table.schema.field("embedding").type
    )
    for found in ([line["embedding"] for line in lines[:3]], table["embedding"].to_pylist()[:3]):
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-5, rtol=1e-5)
    for folder in ("out", "merged"):
        assert main(["eval", folder, "layerpeft://pairs_eval.jsonl", "--out", f"{folder}.json"]) == 0
        assert json.loads(Path(f"{folder}.json").read_text())["recall@1"] == pytest.approx(
            result.after["eval_recall@1"]
        )
    scored = rows_of(losses.SCORED)
    assert main(["eval", "out", scored]) == 0
    assert "spearman: " in capsys.readouterr().out


@there
@pytest.mark.slow
def test_the_shipped_recipe_makes_the_right_text_the_nearest() -> None:
    result = run(load_recipe("embeddings", ["output_dir=out", "use_cpu=true"]), lambda said: None)
    assert result.before["eval_recall@1"] < 0.2 and result.after["eval_recall@1"] > 0.6


@there
@pytest.mark.slow
def test_a_model_that_writes_and_reads_trains_its_encoder(place: Path) -> None:
    _, before, _ = trained(
        "fixed", "model_name_or_path=layerpeft://toy-t5", "output_dir=out", "layerpeft.select=last:1"
    )
    record = json.loads(Path("out/layerpeft.json").read_text())
    assert moved(place / "out", before) == wanted(record, before) and not any(n.startswith("decoder.") for n in before)
    assert main(["predict", "out", "layerpeft://pairs_eval.jsonl", "--out", "found.jsonl"]) == 0


@there
@pytest.mark.slow
def test_states_below_the_cut_are_filled_ahead_for_all_texts_of_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAYERPEFT_QUIET", "")
    asked = ["layerpeft.select=last:2", "layerpeft.prefix_cache=./states", "layerpeft.lower_dropout=off", *SIZES]
    assert main(["prefill", "embeddings", *asked, "output_dir=out"]) == 0
    assert "of 15 rows of training and 4 held out" in capsys.readouterr().out  # of two texts each, one twice
    assert main(["train", "embeddings", *asked, "output_dir=out"]) == 0
    assert "nothing below layer 2 is loaded" in capsys.readouterr().err
    assert main(["train", "embeddings", *asked, "layerpeft.prefix_cache=./none", "output_dir=whole"]) == 0
    weights = [load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "whole")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-4)


@there
def test_a_preview_shows_each_text_of_a_row(place: Path) -> None:
    scored = rows_of(losses.SCORED, 24)
    recipe = load_recipe(
        "embeddings", [f"dataset_name={scored}", "eval_dataset=null", "loss=null", "output_dir=out"], "plan"
    )
    shown = preview(recipe, 2)
    first = shown.shown[0]
    assert [part.name for part in first.parts] == ["sentence1", "sentence2"] and not first.parts[0].learned
    assert first.facts[0].startswith("label: 0.")


@there
@pytest.mark.slow
def test_a_plan_counts_each_text_of_a_row_and_init_knows_the_rows(place: Path) -> None:
    triples = [f"dataset_name={rows_of(losses.TRIPLE)}", "eval_dataset=null", "output_dir=out"]
    assert "assumed: 48 rows of 256 tokens" in str(
        forecast("embeddings", triples)
    )  # 16 of the recipe, three texts each
    given = Wanted("layerpeft://toy-bert", rows_of(losses.SCORED, 24), held_out="10%", out="made.yaml")
    path, made = init(given)
    assert made.recipe.trainer == "embeddings" and "embeddings" in path.read_text()


@there
def test_code_that_modules_name_runs_where_it_is_trusted_alone_and_is_named_before(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = place / "model"
    shutil.copytree(resolve("layerpeft://toy-bert"), home)
    own = "sentence_transformers.base.modules.transformer.Transformer"
    listed = [{"idx": i, "name": str(i), "path": "", "type": kind} for i, kind in enumerate((own, "custom.Pool"))]
    (home / "modules.json").write_text(json.dumps(listed))
    (home / "custom.py").write_text("raise SystemExit('it ran')\n")
    asked = [f"model_name_or_path={home}", "output_dir=out"]
    monkeypatch.setattr("layerpeft.recipe.train.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(
        RecipeError, match=r"modules.json names code .* \(custom.Pool\); trust_remote_code: true lets it run"
    ):
        run(load_recipe("embeddings", asked))
    forget()
    with (
        kept_out("--run-code lets it"),
        pytest.raises(RecipeError, match=r"custom.py \(SHA-256 .*custom.Pool.*--run-code"),
    ):
        trainer.prepare(load_recipe("embeddings", [*asked, "trust_remote_code=true"]))
    trainer.prepare(load_recipe("embeddings", [*asked, "trust_remote_code=true"]))
    assert "runs code that is not layerpeft's: " in capsys.readouterr().err
    (home / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.BoW", "path": ""}]))
    with pytest.raises(RecipeError, match=r"needs a transformer as its first module \(it is BoW\)"):
        trainer.prepare(load_recipe("embeddings", asked))


@there
@pytest.mark.slow
def test_arms_are_compared_by_what_the_rows_are_measured_by(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["output_dir=out", *SIZES, "save_strategy=no", "max_eval_samples=8", "layerpeft.select=last:1"]
    assert main(["compare", "embeddings", *asked, "--arms", "random:1"]) == 0
    assert "recall at 1" in capsys.readouterr().out
    assert json.loads(Path("out/compare.json").read_text())["measure"] == "eval_recall@1"
