"""Every trainer of TRL with every kind of config: it trains what was chosen and nothing else, against the base as its reference;
plain PEFT loads it, it resumes. All cells: `pytest -m "" tests/recipe/test_trl_trainers.py`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.integrations.code import forget, kept_out
from layerpeft.integrations.trl import MAKES
from layerpeft.recipe import keys, trainer
from layerpeft.recipe.beside import rewards
from layerpeft.recipe.calls import calls_of
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.rows import Unfit
from layerpeft.recipe.shipped import find_recipe
from layerpeft.recipe.tasks import preferences, prompts
from layerpeft.recipe.tasks.shape import How, cells, form_of
from layerpeft.recipe.tasks.task import Known
from layerpeft.recipe.train import run
from layerpeft.recipe.trainers import table, trl
from tests.helpers.short import short_llama
from tests.helpers.tiny import SIZES, STEPS, TRL
from tests.recipe.test_shipped import moved, of_base, tensors, wanted

CONFIGS = {
    "lora": "{method: lora, select: last:2, r: 2}",
    "waiting": "{method: lora, select: {by: gradient_norm, keep: 2}, r: 2}",
    "galore": "{method: galore, select: last:2, r: 4, update_proj_gap: 1}",
    "full": "{method: full, select: last:1}",
    "nf4": "{method: lora, select: last:2, r: 2, quantize_frozen: nf4}",
    "lisa": "{method: full, select: {pick: uniform, keep: 1, reselect_steps: 1}}",
}
REWARD = """
def length(completions, **kwargs):
    return [float(sum(map(ord, text)) % 97) for text in completions]
"""
OWN = ("num_generations=2", "max_completion_length=6", "rewards=[./rewards.py:length]", "beta=0.1")
PAIRS = ("dataset_name=pairs.jsonl", "eval_dataset=pairs.jsonl")
TAUGHT = ("drop=null", "teacher_model_name_or_path=teacher")
SHORT = {
    **dict.fromkeys(("cpo", "dpo", "kto", "orpo", "reward"), PAIRS),
    "grpo": OWN,
    "rloo": OWN,
    "online_dpo": ("max_new_tokens=6", "rewards=./rewards.py:length", "max_length=200"),
    "gkd": (*TAUGHT, "max_new_tokens=4", "lmbda=0.5"),
    "distillation": (*TAUGHT, "max_completion_length=4"),
}
QUICK = {("dpo", "waiting")}
CELLS = [
    pytest.param(name, config, marks=() if (name, config) in QUICK else pytest.mark.slow, id=f"{name}-{config}")
    for name in TRL
    for config in CONFIGS
]
IDS = torch.arange(100, 124)[None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shallow: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "rewards.py").write_text(REWARD)
    pairs = [{"prompt": f"{n} and {n}:", "chosen": f" {2 * n}", "rejected": f" {n} or more"} for n in range(3, 11)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name in TRL:
        shutil.copy(find_recipe(name), tmp_path)
    return tmp_path


def settings(name: str, config: str) -> list[str]:
    sizes = [size for size in SIZES if table.row_of(name).evaluates or "eval" not in size]
    return [*sizes, *SHORT.get(name, ()), f"layerpeft={CONFIGS[config]}"]


def trained(name: str, config: str, *more: str) -> tuple[Any, dict[str, torch.Tensor], Any, list[int]]:
    """A trainer when it is done, the model's tensors from before, what came of it, and how often the adapter was switched off."""
    held: list[Any] = []
    off: list[int] = []
    make = trainer.make_trainer

    def kept(setup: Any, model: Any, **changes: Any) -> Any:
        before = {of_base(n): p.detach().clone() for n, p in tensors(model)}
        switch = model.disable_adapter
        model.disable_adapter = lambda: (off.append(1), switch())[1]
        held[:] = make(setup, model, **changes), before
        return held[0]

    if "teacher" in str(SHORT.get(name)) and not Path("teacher").exists():
        shutil.copytree(short_llama(), "teacher")
        tensors_there = load_file("teacher/model.safetensors")
        noised = {n: t + 0.05 * torch.randn_like(t) for n, t in tensors_there.items()}
        save_file(noised, "teacher/model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerpeft.recipe.train.make_trainer", kept)
        result = run(load_recipe(f"{name}.yaml", [*settings(name, config), *more]), lambda said: None)
    return held[0], held[1], result, off


@pytest.mark.parametrize(("name", "config"), CELLS)
def test_a_trainer_trains_what_was_chosen_against_the_base_loads_in_plain_peft_and_resumes(
    name: str, config: str, place: Path
) -> None:
    whole = place / "whole"
    made, before, result, off = trained(name, config, f"output_dir={whole}")
    model = made.model
    record = json.loads((whole / "layerpeft.json").read_text())
    assert record["checks"]["end"].startswith("every chosen") and record["task"]["trainer"] == name
    assert all(row.steps <= STEPS for row in result.report.rows)
    assert bool(result.after) == table.row_of(name).evaluates
    assert moved(whole, before) == wanted(record, before)
    with torch.no_grad():
        ours = model.eval()(input_ids=IDS).logits

    # the reference is the base, to the bit, and there is no copy of anything
    assert set(model.peft_config) == {"default"} and getattr(made, "ref_model", None) is None
    assert bool(off) == table.row_of(name).reference
    with torch.no_grad(), model.disable_adapter():
        switched_off = model(input_ids=IDS).logits
    originals = {of_base(n): t for n, t in tensors(model) if ".original_module." in n}
    base = {n: t for n, t in tensors(model.unload()) if n.rpartition(".")[0] not in record["new_tensors"]} | originals
    assert base and {n for n, t in base.items() if not torch.equal(t, before[n])} == set()
    kind = getattr(transformers, str(table.row_of(name).model))
    more = {} if record["head"] is None else {"num_labels": 1}
    plain = kind.from_pretrained(record["config"]["base_model_name_or_path"], dtype=torch.float32, **more).eval()
    with torch.no_grad():
        if not record.get("quant") and not more:  # a base as it lies on the disk
            assert torch.equal(switched_off, plain(input_ids=IDS).logits)
        loaded = peft.PeftModel.from_pretrained(plain, str(whole)).eval()
        if not record.get("quant"):
            torch.testing.assert_close(loaded(input_ids=IDS).logits, ours, atol=1e-5, rtol=1e-5)
    saved = load_file(whole / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(loaded)
    assert held.keys() == saved.keys() and all(torch.equal(held[n].float(), saved[n].float()) for n in saved)

    shutil.copytree(whole / "checkpoint-1", place / "again" / "checkpoint-1")
    trained(name, config, f"output_dir={place / 'again'}", "resume_from_checkpoint=true")
    again = load_file(place / "again" / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert {n for n, t in saved.items() if not torch.equal(t, again[n])} == set()


# the table


def refused(name: str, *settings: str, purpose: str = "train") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, settings, purpose)
    return str(caught.value)


def test_what_trl_has_stands_where_the_table_says() -> None:
    """Fails loudly where TRL moves a trainer, above all an experimental one, or makes its models another way."""
    for row in trl.ROWS:
        assert table.absent(row) is None, (
            f"{row.name}: TRL has moved {row.trainer}; its row in recipe/trainers/trl.py follows"
        )
        if row.reference:
            kind = table.named(row.trainer)
            takes = inspect.signature(kind).parameters
            makes = hasattr(importlib.import_module(kind.__module__), MAKES)
            assert "peft_config" in takes and (makes or "ref_model" in takes), row.name
    assert {row.name for row in trl.ROWS} == {"sft", *TRL}
    for name, function in rewards.of_trl().items():
        assert name.startswith("get_") or "completions" in inspect.signature(function).parameters


def test_a_new_trainer_of_trl_is_one_row(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    grpo = table.row_of("grpo")
    row = dataclasses.replace(
        grpo, name="gmpo", trainer="trl.experimental.gmpo.GMPOTrainer", arguments="trl.experimental.gmpo.GMPOConfig"
    )
    monkeypatch.setitem(table.ROWS, "gmpo", row)  # type: ignore[arg-type]
    monkeypatch.setitem(SHORT, "gmpo", (*OWN, "trainer=gmpo"))
    shutil.copy("grpo.yaml", "gmpo.yaml")
    made, before, result, off = trained("gmpo", "lora", "output_dir=whole")
    assert type(made).__name__ == "GMPOTrainer" and off and "ref" not in made.model.peft_config
    assert moved(place / "whole", before) == wanted(json.loads(Path("whole/layerpeft.json").read_text()), before)
    assert result.after["eval_reward"] > 0


def test_a_trainer_that_this_version_does_not_have_is_refused_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = dataclasses.replace(table.row_of("cpo"), trainer="trl.experimental.gone.CPOTrainer")
    monkeypatch.setitem(table.ROWS, "cpo", row)  # type: ignore[arg-type]
    said = refused("cpo.yaml")
    assert "cpo is not in the trl that is installed" in said and "no trl.experimental.gone.CPOTrainer" in said
    assert "sft, classification" in said and "dpo, kto" in said and "orpo, online_dpo" in said  # cpo is not there


def test_an_unknown_trainer_lists_those_there_are_with_the_nearest() -> None:
    said = refused("dpo.yaml", "trainer=online_dpp")
    assert "one of sft, classification" in said and "Did you mean 'online_dpo'?" in said
    assert all(name in said for name in keys.TRAINERS)


def test_a_key_is_judged_by_the_trainer_that_is_asked_for() -> None:
    load_recipe("dpo.yaml", ["beta=0.2"])
    said = refused("quickstart", "beta=0.1")
    assert "beta: this is a setting of trainer: dpo or kto or grpo or rloo" in said and "reward" not in said
    assert "Did you mean 'beta'?" in refused("dpo.yaml", "bata=0.1")
    assert "num_generations: this is a setting of trainer: grpo or rloo;" in refused("kto.yaml", "num_generations=2")
    assert "beta: expected a number" in refused("dpo.yaml", "beta=[]")
    assert "rewards: this is a setting of trainer: grpo or rloo or online_dpo" in refused(
        "dpo.yaml", "rewards=./rewards.py:length"
    )


# what a trainer needs besides


def test_code_goes_with_a_copy_of_its_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "inside").mkdir()
    assert main(["recipes", "copy", "grpo", "inside"]) == 0
    load_recipe("inside/grpo.yaml")
    assert (place / "inside" / "gsm8k_rewards.py").is_file()


def test_rewards_are_looked_at_before_anything_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "inside").mkdir()
    (place / "boom.py").write_text(
        "raise SystemExit(1)\ndef fine(completions, **kwargs): ...\ndef bare(completions): ...\n"
    )
    outside = place.parent / f"{place.name}-outside.py"
    outside.write_text(REWARD)
    (place / "link.py").symlink_to(outside)
    wrong = {
        "null": "rewards: missing; trainer: grpo needs it",
        f"{outside}:length": "code is taken from beside the recipe alone",
        f"../{outside.name}:length": "code is taken from beside the recipe alone",
        "link.py:length": "code is taken from beside the recipe alone",
        "gone.py:length": "is no file of code",
        "rewards.py:lenght": "has no 'lenght'. Did you mean 'length'?",
        "rewards.py": "say which function of it",
        "boom.py:bare": "takes no other arguments",
        "think_format_rewart": "Did you mean 'think_format_reward'?",
        "get_soft_overlong_punishment": "write {get_soft_overlong_punishment: {max_completion_len: …",
        "{think_format_reward: {size: 3}}": "takes no options",
        "inside": "has no config.json",
        "[3]": "expected the name of a function",
    }
    for item, sentence in wrong.items():
        assert sentence in refused("grpo.yaml", f"rewards={item}"), item
    load_recipe(
        "grpo.yaml",
        ["rewards=[boom.py:fine, {get_soft_overlong_punishment: {max_completion_len: 9, soft_punish_cache: 3}}]"],
    )
    assert "boom" not in capsys.readouterr().err  # nothing has run


def test_code_of_rewards_is_named_before_it_runs_and_goes_with_the_recipe(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("loud.py").write_text("import sys\nprint('loud is here', file=sys.stderr)\n" + REWARD)
    forget()
    recipe = load_recipe("grpo.yaml", ["rewards=[./loud.py:length]", "output_dir=out", "max_train_samples=4"])
    setup = trainer.prepare(recipe)
    assert "loud" not in capsys.readouterr().err
    rewards.ready(setup)
    found = rewards.given(setup)["reward_funcs"]
    said = capsys.readouterr().err
    assert said.index("rewards: ./loud.py:length: runs code that is not layerpeft's") < said.index("loud is here")
    assert found[0](["ab"]) == [float((97 + 98) % 97)] and rewards.files(recipe) == ["./loud.py"]
    assert set(setup.train.column_names) == {"prompt", "question", "answer"}  # which rewards are given
    with pytest.raises(RecipeError, match="reads conversations, and the prompts are text"):
        rewards.ready(trainer.prepare(load_recipe("grpo.yaml", ["rewards=think_format_reward", "max_train_samples=4"])))
    with kept_out("a cure"), pytest.raises(RecipeError, match="would run code"):
        rewards.given(setup)
    Path("loud.py").write_text(REWARD + "\nraise OSError('no')\n")
    with pytest.raises(RecipeError, match="loud.py: OSError: no"):  # before any weight
        trainer.load_model(setup)


def test_what_a_trainer_cannot_do_is_said_at_its_key(place: Path) -> None:
    assert "(8 * 1) must be divisible" in refused("grpo.yaml", "num_generations=3", "per_device_train_batch_size=6")
    assert "exits: is learned beside the loss" in refused("dpo.yaml", "exits=[2, 5]")
    assert "distill: is learned beside the loss" in refused(
        "dpo.yaml", "layerpeft.distill={layers: [1], teacher: base}"
    )
    assert "drop: is measured on batches" in refused("gkd.yaml", "drop={keep: 80%}")
    assert "quant: precisions are measured on batches" in refused(
        "dpo.yaml", "layerpeft.quant={bits: 4, select: {by: output_kl, keep: 2}}"
    )
    setup = trainer.prepare(load_recipe("grpo.yaml", [*OWN, *SIZES, "per_device_train_batch_size=4"]))
    with pytest.raises(RecipeError, match="its answers are written in training"):
        calls_of(setup)
    assert "layers are scored by its loss in its own first step" in refused("dpo.yaml", purpose="score")


@pytest.mark.slow
def test_what_a_trainer_finds_wrong_when_it_is_built_is_said_at_its_key() -> None:
    recipe = load_recipe("kto.yaml", [*PAIRS, "per_device_train_batch_size=1"])
    setup = trainer.prepare(recipe)
    model = trainer.wrap(setup, trainer.load_model(setup), recipe.select, None)
    with pytest.raises(RecipeError, match="kto: Actual .not effective. batch size must be > 1"):
        trainer.make_trainer(setup, model)


def test_a_teacher_has_the_tokens_of_its_student_and_lies_where_it_is_said(place: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=77, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(place / "other")
    assert "the teacher has 77 tokens and the model 4096" in refused(
        "gkd.yaml", "teacher_model_name_or_path=other", "drop=null"
    )
    assert "no folder './gone'" in refused("gkd.yaml", "teacher_model_name_or_path=./gone")
    assert "teacher_model_name_or_path: missing" in refused("distillation.yaml", "teacher_model_name_or_path=null")


def test_what_has_no_held_out_numbers_refuses_rows_for_them() -> None:
    said = refused("online_dpo.yaml", "eval_dataset=pairs.jsonl", "eval_strategy=steps")
    assert said.count("trainer: online_dpo measures nothing on held-out rows; take it out") == 2


# rows


def shaped(task: Any, row: dict[str, Any]) -> dict[str, Any]:
    return task.row(
        cells(row, How(task, (), (*form_of(task, list(row)), *row) if task.others else form_of(task, list(row)))),
        Known(),
    )


def said(*pairs: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), pair.split("=", 1))) for pair in pairs]


def test_preferences_in_every_shape_are_one() -> None:
    asked, good, bad = said("user=2 + 2?"), said("assistant=4"), said("assistant=5")
    share = [{"from": "human", "value": "2 + 2?"}], {"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}
    shapes = [
        {"prompt": asked, "chosen": good, "rejected": bad},
        dict(zip(("conversations", "chosen", "rejected"), share)),
        {"prompt": "2 + 2?", "chosen": asked + good, "rejected": asked + bad},
        {"chosen": asked + good, "rejected": asked + bad},
        {"messages": json.dumps(asked), "chosen": json.dumps(good), "rejected": "5"},
        {"user": "2 + 2?", "chosen": "4", "rejected": "5"},
    ]
    for row in shapes:
        assert shaped(preferences.PAIRS, row) == {"prompt": asked, "chosen": good, "rejected": bad}, row
    text = {"prompt": "2 + 2?", "chosen": " 4", "rejected": " 5"}
    assert shaped(preferences.PAIRS, text) == text and shaped(preferences.UNPAIRED, text) == text
    for label, liked in {True: True, 0: False, "false": False, "Yes": True}.items():
        row = {"messages": asked + good, "label": label}
        assert shaped(preferences.UNPAIRED, row) == {"prompt": asked, "completion": good, "label": liked}
    wrong = {
        "which is neither true (liked) nor false": {"prompt": "a", "completion": "b", "label": "maybe"},
        "do not end with an answer": {"messages": asked, "label": True},
        "without content": {"prompt": [{"role": "user"}], "chosen": good, "rejected": bad},
        "do not begin with one prompt": {
            "chosen": said("user=a", "assistant=b"),
            "rejected": said("user=c", "assistant=d"),
        },
    }
    for sentence, row in wrong.items():
        with pytest.raises(Unfit, match=re.escape(sentence)):
            shaped(preferences.UNPAIRED if "label" in row else preferences.PAIRS, row)
    prompt = shaped(prompts.REWARDED, {"messages": asked + good, "answer": 4, "level": ["a"]})
    assert prompt["prompt"] == asked and (prompt["answer"], prompt["level"]) == (4, ["a"])


def test_rows_that_teach_nothing_are_left_out_and_counted(place: Path) -> None:
    rows = [
        ("short", "one", "two"),
        ("short", "same", "same"),
        ("a long prompt " * 20, "x", "y"),
        ("short", "z " * 60, "two"),
    ]
    Path("rows.jsonl").write_text(
        "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), r))) + "\n" for r in rows)
    )
    given = ["dataset_name=rows.jsonl", "eval_dataset=pairs.jsonl", "max_length=32"]
    found = trainer.prepare(load_recipe("dpo.yaml", given)).counts["training"]
    assert (found.read, found.kept, found.cut) == (4, 2, 1)
    assert dict(found.dropped) == {
        "have one answer both chosen and rejected": 1,
        "have no label left within max_length: 32": 1,
    }
    found = trainer.prepare(load_recipe("reward.yaml", given)).counts["training"]
    assert found.kept == 1 and found.dropped["are longer than max_length: 32"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gkd", "distillation"])
def test_a_shorter_student_learns_from_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [s for s in SHORT[name] if s not in TAUGHT]
    monkeypatch.setitem(SHORT, name, (*short, "drop=[2]"))
    made, _, result, _ = trained(name, "lora", "output_dir=whole")
    assert made.model.config.num_hidden_layers + 1 == made.teacher_model.config.num_hidden_layers
    assert result.after["eval_loss"] > 0 and Path("whole/shorter/config.json").is_file()


@pytest.mark.slow
def test_a_reward_model_that_was_trained_rewards(place: Path) -> None:
    trained("reward", "lora", "output_dir=judge")
    made, _, result, _ = trained("online_dpo", "lora", "output_dir=whole", "rewards=judge")
    assert type(made.reward_funcs[0]).__name__ == "LlamaForSequenceClassification" and result.report
    head = load_file("judge/adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(made.reward_funcs[0].score.weight, head)
