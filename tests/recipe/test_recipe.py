"""The pieces under a recipe: YAML, type checks, other spellings, data files, templates, and the recipe as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

from layerpeft.errors import RecipeError
from layerpeft.recipe import cures, foreign, keys, rows, shipped, templates
from layerpeft.recipe.beside import rewards
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import layer_config, to_yaml, training_arguments
from layerpeft.recipe.trainers import table
from layerpeft.recipe.yaml import dump, flow, override, parse, spelled
from layerpeft.selection.typecheck import Setting, complaint, fits, settings_of
from layerpeft.selection.typecheck import build as build_value

pytestmark = pytest.mark.usefixtures("shallow")

# ---- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("2.5e-4", 2.5e-4),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o17", 15),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-5'", "1e-5"),
        ("first:10+last:2", "first:10+last:2"),
        ("25%", "25%"),
        ("[3, -1]", [3, -1]),
        ("!!str 5", "5"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    document = parse(f"a: {text}\n")
    assert document.faults == ()
    assert document.data["a"] == value and type(document.data["a"]) is type(value)


def test_the_global_loader_is_left_alone() -> None:
    assert yaml.safe_load("a: off\nb: 1e-5\nc: 010") == {"a": False, "b": "1e-5", "c": 8}


def test_places_follow_lists_and_mappings() -> None:
    document = parse("a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - 4\n")
    assert spelled(document.line("b", "c")) == "line 3"
    assert spelled(document.line("b", "d", 1)) == "line 6"
    assert spelled(document.line("b", "zzz")) == "line 2"
    assert spelled(document.line("zzz")) == ""


def test_merge_keys_and_anchors() -> None:
    document = parse("base: &b {r: 4, x: 1}\nown:\n  <<: *b\n  r: 8\n")
    assert document.faults == ()
    assert document.data["own"] == {"r": 8, "x": 1}


def test_dump_is_read_back_unchanged() -> None:
    data = {
        "rate": 1e-5, "text": "1e-5", "word": "off", "zero": "010", "none": None, "day": "2024-01-01", "list": [1, {"x": 2}],
        "lines": "a\nb: c\t{d}", "time": "1:30", "share": "25%", "grammar": "first:10+last:2", "empty": "", "yes": True,
    }  # fmt: skip
    again = parse(dump(data))
    assert again.faults == ()
    assert again.data == data
    assert yaml.safe_load(dump(data)) == data


def test_override_reaches_inside_and_says_where_it_was_written() -> None:
    document = parse("a: 1\nlayerpeft:\n  r: 4\n  select: {by: random, keep: 2}\n")
    after = override(document, ["layerpeft.select.keep=3", "a=1e-5", "layerpeft.lora_alpha=8", "new.deep={x: [1]}"])
    assert after.faults == ()
    assert after.data["layerpeft"] == {"r": 4, "select": {"by": "random", "keep": 3}, "lora_alpha": 8}
    assert after.data["a"] == 1e-5 and after.data["new"] == {"deep": {"x": [1]}}
    assert spelled(after.line("layerpeft", "select", "keep")) == "command line"
    assert spelled(after.line("layerpeft", "select", "by")) == "line 4"
    assert document.data["layerpeft"]["select"]["keep"] == 2


def test_templates_on_the_command_line_are_text() -> None:
    settings = ["columns.text={x}", "columns.prompt=Q: {q}, {z}", 'columns.completion="{a}\\n"', "other.text={x: 1}"]
    after = override(parse("columns: {text: a}\n"), settings)
    assert after.faults == ()
    assert after.data["columns"] == {"text": "{x}", "prompt": "Q: {q}, {z}", "completion": "{a}\n"}
    assert after.data["other"] == {"text": {"x": 1}} and spelled(after.line("columns", "text")) == "command line"


@pytest.mark.parametrize(
    "value", [3, 1e-5, True, None, "last:2", "1e-5", [9, 11], {"by": "random", "keep": 2}, "a, b: c"]
)
def test_a_value_on_one_line_is_read_back(value: Any) -> None:
    assert override(parse("a: 1\n"), [f"b.c={flow(value)}"]).data["b"]["c"] == value
    assert "\n" not in flow(value)


@pytest.mark.parametrize(
    ("setting", "fragment"),
    [
        ("a", "not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("a..b=1", "not of the form key=value"),
        ("a=[1", "not readable as YAML"),
        ("select.keep=2", "select is 'last:4' in the recipe, which has no part 'keep'"),
    ],
)
def test_override_problems(setting: str, fragment: str) -> None:
    after = override(parse("select: last:4\n"), [setting])
    assert len(after.faults) == 1 and fragment in str(after.faults[0])


# ---- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [1, -1, 0], [True, 1.0, "1", None]),
        (float, [1, 0.5], [True, "1", float("inf"), float("nan")]),
        (bool, [True, False], [1, 0, "true"]),
        (str, ["a", ""], [1, None, True]),
        (int | None, [1, None], ["x"]),
        (list[str], [["a"], []], ["a", [1], {"a": 1}]),
        (str | list[str], ["a", ["a"]], [1, [1]]),
        (dict[str, int], [{"a": 1}], [{"a": "x"}, [1]]),
        (dict, [{"a": 1}], ["a"]),
        (Literal["a", False], ["a", False], ["b", 0, True]),
        (tuple[int, int], [[1, 2]], [[1], [1, 2, 3], ["a", 1]]),
        (list[tuple[int, int]], [[[0, 4], [2, 5]]], [[0, 4]]),
        (Any, [1, "a", None], []),
    ],
)
def test_fits(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert [v for v in good if not fits(hint, v)] == []
    assert [v for v in bad if fits(hint, v)] == []


def test_fits_reads_the_real_classes() -> None:
    arguments, lora = settings_of(TrainingArguments), settings_of(LoraConfig)
    assert fits(arguments["eval_strategy"].hint, "epoch") and not fits(arguments["eval_strategy"].hint, "sometimes")
    assert fits(arguments["warmup_steps"].hint, 0.1) and fits(arguments["report_to"].hint, ["none"])
    assert fits(lora["init_lora_weights"].hint, "pissa_niter_4") and not fits(
        lora["init_lora_weights"].hint, "pissa_niter_x"
    )
    assert fits(lora["eva_config"].hint, {"rho": 2.0}) and not fits(lora["eva_config"].hint, {"rha": 2.0})
    assert complaint(settings_of(SFTConfig)["loss_type"], "ce") is not None
    assert complaint(settings_of(SFTConfig)["loss_type"], "nll") is None


def test_nested_dataclasses_are_built() -> None:
    built = build_value(settings_of(LoraConfig)["eva_config"].hint, {"rho": 3.0})
    assert type(built).__name__ == "EvaConfig" and built.rho == 3.0
    assert build_value(int, 3) == 3 and build_value(dict, {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("hint", "value", "advice"),
    [
        (bool, "on", "write `true`"),
        (int, "010", "write 10"),
        (float, "1e-5", "take the quotes away"),
        (int, 3.0, "write 3"),
        (str, 3, "put it in quotes: '3'"),
        (list[int], "3", "write a list: [3]"),
    ],
)
def test_advice(hint: Any, value: Any, advice: str) -> None:
    assert advice in (complaint(Setting(hint), value) or "")


# ---- other spellings ------------------------------------------------------------------------------------------------


def test_every_mapped_key_is_gone_and_every_new_one_exists() -> None:
    for trainer in keys.TRAINERS:
        known = keys.top_settings(trainer)
        assert set(foreign.RENAMED) & set(known) == set()
        only_sft = set() if trainer in ("sft", "gkd") else {"packing", "eval_packing"}
        written = trainer in ("grpo", "rloo", "distillation")  # what is as long as it is written
        only_sft |= {"max_length"} if written or (task := table.task_of(trainer)) and task.in_batches else set()
        assert set(foreign.RENAMED.values()) - set(known) == only_sft


def test_mapping_is_told() -> None:
    given = {
        "warmup_ratio": 0.1, "evaluation_strategy": "epoch", "max_seq_length": 128, "base_model": "m", "micro_batch_size": 2,
        "num_epochs": 1, "group_by_length": True, "adafactor": False, "save_safetensors": True, "stage": "sft",
    }  # fmt: skip
    done = foreign.translate(given, keys.top_settings("sft"))
    assert done.complaints == []
    assert done.data == {
        "warmup_steps": 0.1, "eval_strategy": "epoch", "max_length": 128, "model_name_or_path": "m", "trainer": "sft",
        "per_device_train_batch_size": 2, "num_train_epochs": 1, "train_sampling_strategy": "group_by_length",
    }  # fmt: skip
    assert "warmup_ratio is read as warmup_steps" in done.notices
    assert "group_by_length is read as train_sampling_strategy: 'group_by_length'" in done.notices
    assert len(done.notices) == len(given)


def test_warmup_steps_below_one_is_a_share() -> None:
    """The mapping of warmup_ratio stands on this."""
    assert TrainingArguments(output_dir="x", warmup_steps=0.1, use_cpu=True).get_warmup_steps(200) == 20


def test_later_methods_say_so() -> None:
    assert "not in this version" in str(cures.cure("apollo_rank", 2))


@pytest.mark.parametrize(
    "key", ["lisa_activated_layers", "lisa_interval_steps", "use_badam", "freeze_trainable_layers"]
)
def test_methods_of_papers_are_said_in_our_words(key: str) -> None:
    assert "method: full" in str(cures.cure(key, 2))


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = [{"question": "q0", "answer": "a0"}, {"question": "q1", "answer": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    (tmp_path / "a.json").write_text(json.dumps(table, indent=1))
    (tmp_path / "a.csv").write_text('question,answer\nq0,a0\n"q1",\n')
    (tmp_path / "a.tsv").write_text("question\tanswer\nq0\ta0\nq1\t\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_is_read(kind: str, files: Path) -> None:
    assert rows.columns_of(files / f"a.{kind}") == ["question", "answer"]
    found = rows.load(f"a.{kind}", config=None, split="train")
    shaped = rows.shape(found, "sft", {"prompt": "Q: {question}", "completion": "{answer}!"})
    assert shaped.column_names == ["prompt", "completion"]
    assert shaped[0] == {"prompt": "Q: q0", "completion": "a0!"}
    assert shaped[1] == {"prompt": "Q: q1", "completion": "!"}


def test_broken_lines_are_named(files: Path) -> None:
    good = (files / "a.jsonl").read_text()
    (files / "b.jsonl").write_text(good + '{"question": 1,}\n' + good + "[1]\n\n" + '"x"\n{\n')
    found = rows.broken_lines(files / "b.jsonl")
    assert [text.split(":")[0] for text in found] == [f"{files}/b.jsonl, line {n}" for n in (3, 6, 8)]
    assert rows.broken_lines(files / "b.jsonl", most=len(good)) == [] and rows.broken_lines(files / "a.csv") == []
    assert rows.columns_of(files / "b.jsonl") == ["question", "answer"]
    with pytest.raises(RecipeError, match="b.jsonl, line 3: not readable as JSON"):
        rows.load("b.jsonl", config=None, split="train")


def test_lists_and_patterns_of_files(files: Path) -> None:
    (files / "b.jsonl").write_text((files / "a.jsonl").read_text())
    assert rows.local_files("*.jsonl") == [Path("a.jsonl"), Path("b.jsonl")]
    assert len(rows.load(["a.jsonl", "b.jsonl"], config=None, split="train")) == 4
    assert rows.local_files("org/name") is None and rows.local_files(".") is None
    with pytest.raises(RecipeError, match="different kinds"):
        rows.local_files(["a.csv", "a.jsonl"])
    with pytest.raises(RecipeError, match=r"2 problems(.|\n)*x\.csv(.|\n)*y\.csv"):
        rows.local_files(["x.csv", "y.csv"])


def test_a_folder_with_splits(files: Path) -> None:
    folder = files / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text((files / "a.jsonl").read_text())
    (folder / "test.jsonl").write_text((files / "a.jsonl").read_text())
    assert len(rows.load("set", config=None, split="test", optional=True)) == 2
    assert rows.load("set", config=None, split="validation", optional=True) is None
    with pytest.raises(RecipeError, match="cannot load the data 'set'"):
        rows.load("set", config=None, split="validation")


def test_chat_templates_make_messages() -> None:
    import datasets

    found = rows.shape(
        datasets.Dataset.from_list([{"q": "Why?", "a": "So."}]),
        "sft",
        {"system": "Be brief.", "user": "{q}", "assistant": "{a}"},
    )
    assert found[0]["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert found[0]["completion"] == [{"role": "assistant", "content": "So."}]


def test_templates() -> None:
    assert templates.fill("{a} and {{b}} and {c d}", {"a": 1, "c d": "x"}) == "1 and {b} and x"
    assert templates.template_columns("{a}{b}") == ["a", "b"]
    for template in ("{a!r}", "{a:>3}", "{}", "{a", "a}"):
        with pytest.raises(ValueError, match="brace"):
            templates.fill(template, {"a": 1})
    with pytest.raises(KeyError):  # a dot is part of the name, never an attribute
        templates.fill("{a.real}", {"a": 1})


def test_shipped_addresses() -> None:
    assert Path(shipped.resolve("layerpeft://llama-6m"), "config.json").is_file()
    assert shipped.resolve("org/name") == "org/name"
    assert "gsm8k_train.jsonl" in shipped.data_names()
    with pytest.raises(RecipeError, match="Did you mean 'llama-6m'"):
        shipped.resolve("layerpeft://llama6m")
    with pytest.raises(RecipeError, match="unknown file of the package"):
        shipped.resolve("layerpeft://../cli.py")


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", sorted(shipped.recipes()))
def test_shipped_recipes_are_good_and_survive_being_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = shipped.recipes()[name].read_text()
    assert text.startswith(f"# layerpeft train {name}\n")
    if "\ndrop: [" in text:  # names layers that the short model does not have
        monkeypatch.setattr(shipped, "_HERE", Path(shipped.__file__).parent)
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    for code in rewards.files(recipe):  # goes with it
        shutil.copy(recipe.path.parent / code, tmp_path)
    again = load_recipe("again.yaml")
    assert again.values == {**recipe.values, "layerpeft": again.values["layerpeft"]}
    assert again.block == recipe.block
    assert layer_config(again).to_dict() == layer_config(recipe).to_dict()


def test_a_teacher_is_looked_for_before_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="distill: teacher: 'nowhere/at-all' cannot be had as LlamaForCausalLM"):
        load_recipe("distill", ["layerpeft.distill.teacher=nowhere/at-all"], "train")
    with pytest.raises(RecipeError, match="the teacher has no layer 12"):
        load_recipe("distill", ["layerpeft.distill.map={0: 12}", "layerpeft.distill.layers=0"], "train")


def test_settings_reach_arguments_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        "quickstart", ["learning_rate=1e-4", "layerpeft.r=2", "layerpeft.select=last:2", "warmup_ratio=0.25", "seed=7"]
    )
    arguments = training_arguments(recipe)
    assert isinstance(arguments, SFTConfig)
    assert (arguments.learning_rate, arguments.seed, arguments.data_seed) == (1e-4, 7, 7)
    assert arguments.warmup_steps == 0.25  # the command line overrules the recipe under either spelling
    assert arguments.report_to in ([], ["none"], "none")
    config = layer_config(recipe)
    assert (config.r, config.select, str(config.task_type)) == (2, "last:2", "CAUSAL_LM")


def test_secrets_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart", ["hub_token=abc123"])
    assert recipe.values["hub_token"] == "abc123" and "abc123" not in to_yaml(recipe)


def test_bf16_is_turned_off_where_no_device_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "".join(x for x in shipped.recipes()["quickstart"].read_text().splitlines(True) if not x.startswith("bf16"))
    (tmp_path / "r.yaml").write_text(text)
    monkeypatch.setattr("layerpeft.recipe.surroundings.has_bf16", lambda: False)
    recipe = load_recipe("r.yaml")
    assert training_arguments(recipe).bf16 is False and any("bf16 is off" in notice for notice in recipe.notices)
    for purpose in ("score", "preview", "prefill"):  # no step is computed
        assert not any("bf16" in notice for notice in load_recipe("r.yaml", purpose=purpose).notices)
    monkeypatch.setattr("layerpeft.recipe.surroundings.has_bf16", lambda: True)
    assert "bf16" not in load_recipe("r.yaml", ["use_cpu=true"]).values


def test_overwriting_and_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text("{}")
    assert load_recipe("quickstart", ["output_dir=out"]).output_dir == Path("out")  # what `score` left is no obstacle
    (tmp_path / "out" / "anything").write_text("")
    with pytest.raises(RecipeError, match="not empty"):
        load_recipe("quickstart", ["output_dir=out"])
    assert load_recipe("quickstart", ["output_dir=out"], "score").output_dir == Path("out")
    assert load_recipe("quickstart", ["output_dir=out", "overwrite_output_dir=true"])["overwrite_output_dir"] is True
