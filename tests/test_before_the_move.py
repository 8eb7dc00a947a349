"""What an earlier version wrote loads: adapters, a checkpoint of a schedule, scores (tests/fixtures/before_the_move)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import layerpeft
from layerpeft.saving.manifest import read_manifest

FOLDER = Path(__file__).parent / "fixtures" / "before_the_move"
TOLD = json.loads((FOLDER / "told.json").read_text(encoding="utf-8"))
IDS = (torch.arange(24).reshape(3, 8) * 7) % 32
TARGETS = ["q_proj", "down_proj"]
METHODS = {"lora": "lora", "projection": "galore", "weights": "full"}


def base() -> Any:
    return LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 32, (2, 8), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def same_logits(model: Any, told: list[list[float]]) -> None:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits[:, -1]
    torch.testing.assert_close(found, torch.tensor(told), rtol=0, atol=1e-5)


def rows_of(model: Any) -> list[list[Any]]:
    return [[row.layer, row.name, row.chosen, row.steps] for row in layerpeft.layer_report(model).rows]


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_loads_with_its_record(name):
    model = layerpeft.load(FOLDER / name, base())
    same_logits(model, TOLD[name]["logits"])
    assert rows_of(model) == TOLD[name]["rows"]
    assert str(layerpeft.layer_report(model)) == TOLD[name]["report"]
    manifest = read_manifest(FOLDER / name)
    assert manifest["format"] == 1 and manifest["method"] == METHODS[name]
    plain = peft.PeftModel.from_pretrained(base(), str(FOLDER / name))
    same_logits(plain, TOLD[name]["logits"])


def test_what_is_loaded_is_saved_with_the_same_record(tmp_path):
    layerpeft.load(FOLDER / "lora", base()).save_pretrained(str(tmp_path))
    then, now = read_manifest(FOLDER / "lora"), read_manifest(tmp_path)
    for row in then["report"]:  # norms that are now taken from products of the rank's size
        if row["change"] is not None:
            row["change"] = pytest.approx(row["change"], rel=1e-6)
    for key in set(then) - {"files", "versions", "sha256"}:  # of the files, their pictures and their libraries
        assert now[key] == then[key], key


def test_a_checkpoint_of_a_schedule_resumes(tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(FOLDER / "checkpoint", tmp_path / "out" / "checkpoint-5")
    torch.manual_seed(0)
    select = {"pick": "cycle", "keep": 1, "reselect_steps": 2}
    config = layerpeft.LayerLoraConfig(select=select, r=2, target_modules=TARGETS)
    model = layerpeft.get_peft_model(base(), config)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=8, per_device_train_batch_size=2, save_strategy="no", logging_strategy="no", report_to=[],
        use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    rows = [{key: value[0].tolist() for key, value in batch.items()} for batch in batches(12)]
    Trainer(model, args, train_dataset=rows).train(resume_from_checkpoint=layerpeft.last_checkpoint(tmp_path / "out"))  # type: ignore[arg-type]
    same_logits(model, TOLD["schedule"]["logits"])
    assert rows_of(model) == TOLD["schedule"]["rows"]


def test_scores_choose_the_same_layers():
    path = FOLDER / "scores.json"
    scores = layerpeft.Scores.load(path)
    assert list(scores.values) == TOLD["scores"]["values"]
    config = layerpeft.LayerLoraConfig(select={"by": str(path), "keep": 2}, r=2, target_modules=TARGETS)
    model = layerpeft.get_peft_model(base(), config)
    assert [row.layer for row in layerpeft.layer_report(model).rows if row.chosen] == TOLD["scores"]["chosen"]
    again = layerpeft.score_layers(base(), "gradient_norm", batches=batches(3), target_modules=TARGETS, num_batches=3)
    assert again.values == pytest.approx(scores.values, rel=1e-4) and again.fingerprint == scores.fingerprint
