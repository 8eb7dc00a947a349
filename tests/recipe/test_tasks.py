"""Every task with every kind of config: it trains what was chosen and its head, nothing else; plain PEFT loads it; it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from layerpeft.recipe import compare, trainer
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.tasks.task import Head
from layerpeft.recipe.train import run
from layerpeft.recipe.trainers import table
from tests.helpers.tiny import BRIEF, CLASSES, SIZES, STEPS, TASKS
from tests.recipe.test_shipped import moved, of_base, tensors, wanted

FULL = ("layerpeft.method=full", "layerpeft.r=null")
CONFIGS: dict[str, tuple[str, ...]] = {
    "fixed": ("layerpeft.select=last:1",),
    "waiting": ("layerpeft.select={by: gradient_norm, keep: 1, num_batches: 1}",),
    "plain": ("layerpeft.select=all",),
    "projection": ("layerpeft.method=galore", "layerpeft.select=last:1", "layerpeft.update_proj_gap=1"),
    "full": (*FULL, "layerpeft.select=last:1"),
    "nf4": ("layerpeft.select=last:1", "layerpeft.quantize_frozen=nf4"),
    "lisa": (*FULL, "layerpeft.select={pick: uniform, keep: 1, reselect_steps: 1}"),
}
MORE = {name: ("generation_max_length=4",) for name in ("seq2seq", "whisper")}
BARE = "layerpeft.lora_alpha=null"  # which is of LoRA alone
BRIEFLY = {
    "quickstart": (BARE, *BRIEF),
    "revision": (BARE, *CLASSES),
}  # recipes of `sft` and of one class a row, here with every method
STACKS = {"seq2seq": "decoder", "whisper": "decoder", "vision_sft": "text"}  # of models that have two
QUICK = {("token_classification", "fixed")}
CELLS = [
    pytest.param(name, config, marks=() if (name, config) in QUICK else pytest.mark.slow, id=f"{name}-{config}")
    for name in (*TASKS, *BRIEFLY)
    for config in CONFIGS
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(name: str, config: str, *settings: str) -> tuple[Any, dict[str, torch.Tensor], Any, Any]:
    """A model, its tensors from before training, what came of it, and a batch of held-out rows."""
    held: list[Any] = []
    make = trainer.make_trainer

    def kept(setup: Any, model: Any, **changes: Any) -> Any:
        before = {of_base(n): p.detach().clone() for n, p in tensors(model)}
        held[:] = [model, before, make(setup, model, **changes)]
        return held[2]

    given, stack = list(CONFIGS[config]), STACKS.get(name)
    if stack:
        given = [s.replace("last:1", f"{{layers: last:1, stack: {stack}}}") for s in given]
        given = [s.replace("keep: 1,", f"keep: 1, stack: {stack},") for s in given]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerpeft.recipe.train.make_trainer", kept)
        more = (*SIZES, *MORE.get(name, ()), *BRIEFLY.get(name, ()), *given, *settings)
        result = run(load_recipe(name, more), lambda said: None)
    batch = {k: v for k, v in next(iter(held[2].get_eval_dataloader())).items() if k != "num_items_in_batch"}
    return held[0], held[1], result, batch


@pytest.mark.parametrize(("name", "config"), CELLS)
def test_a_task_trains_what_was_chosen_and_its_head_loads_in_plain_peft_and_resumes(
    name: str, config: str, place: Path
) -> None:
    whole = place / "whole"
    model, before, result, batch = trained(name, config, f"output_dir={whole}")
    with torch.no_grad():
        ours = model.eval()(**batch)
    assert result.after and all((row.steps or 0) <= STEPS for row in result.report.rows)

    # what was chosen and the head moved, the base did not
    found = moved(whole, before)
    manifest = whole / "layerpeft.json"
    record = json.loads(manifest.read_text()) if manifest.is_file() else {"new_tensors": [], "config": {}}
    assert (config == "plain") != manifest.is_file()
    if record.get("report"):
        inside = {n for n in found if any(f"{n}.".startswith(f"{new}.") for new in record["new_tensors"])}
        assert (
            inside
            and (found - inside) | set(record["new_tensors"]) == wanted(record, before)
            or not record["new_tensors"]
        )
        assert record["new_tensors"] or found == wanted(record, before)
        assert record["task"]["trainer"] == load_recipe(name).trainer
    stock = json.loads((whole / "adapter_config.json").read_text())
    heads = {n for n in ("classifier", "qa_outputs", "lm_head", "score") if any(k.startswith(f"{n}.") for k in before)}
    if name not in ("seq2seq", "whisper", "causal_lm", "masked_lm", "vision_sft", "quickstart"):
        assert heads and heads <= found and heads <= set(stock["modules_to_save"])
    always = [*record["new_tensors"], *(stock["modules_to_save"] or [])]
    originals = {of_base(n): t for n, t in tensors(model) if ".original_module." in n}
    base = {n: t for n, t in tensors(model.unload()) if not n.startswith(tuple(f"{m}." for m in always))} | originals
    assert base and {n for n, t in base.items() if not torch.equal(t, before[n])} == set()

    if config != "nf4":  # over the base as it was loaded
        there = plain(name, whole)
        with torch.no_grad():
            theirs = there(**batch)
        torch.testing.assert_close(theirs.loss, ours.loss, atol=1e-5, rtol=1e-5)

    again = place / "again"
    shutil.copytree(whole / "checkpoint-1", again / "checkpoint-1")
    trained(name, config, f"output_dir={again}", "resume_from_checkpoint=true")
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, again)]
    assert weights[0].keys() == weights[1].keys()
    assert {n for n, t in weights[0].items() if not torch.equal(t, weights[1][n])} == set()


def plain(name: str, folder: Path) -> Any:
    """The adapter of a folder, as PEFT alone puts it on the base that its config names."""
    recipe = load_recipe(name)
    labels = json.loads(file.read_text()) if (file := folder / "labels.json").is_file() else {}
    more: dict[str, Any] = {"id2label": {int(i): n for i, n in labels.items()}} if labels else {}
    more |= {"problem_type": "multi_label_classification"} if name == "multi_label" else {}
    more |= {"num_labels": 1, "problem_type": "regression"} if name == "regression" else {}
    if name == "speech":
        size = len(transformers.AutoProcessor.from_pretrained(folder).tokenizer)
        more |= {"vocab_size": size, "pad_token_id": 0, "ctc_loss_reduction": "mean"}
    home = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    base = trainer.auto_class(recipe).from_pretrained(home, dtype=torch.float32, **more)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def test_every_number_by_which_runs_are_compared_has_a_name() -> None:
    head = Head(("O", "B-X"), {"problem_type": "single_label_classification"}, {"rows": ["anchor", "positive"]})
    found = {name: task.measure(head) for name in table.ROWS if (task := table.task_of(name)) is not None}
    assert found["token_classification"] == "eval_entity_f1" and found["reward"] == "eval_accuracy"
    assert {name: measure for name, measure in found.items() if measure not in compare.NAMES} == {}
