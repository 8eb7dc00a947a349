"""A method that is one file: it trains, is checked, saved, loaded, resumed and planned with no other file changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import ConfigError, TrainingError
from layerpeft.model.names import clean
from layerpeft.planning.fit import fit
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.train import run
from layerpeft.tuners.methods import METHODS, add
from tests.helpers.loops import BY_GRADIENT, adamw, llama, make_batches, step
from tests.helpers.scales import Kind, LayerScaleConfig
from tests.helpers.short import short_llama

RECIPE = """
trainer: sft
model_name_or_path: {base}
dataset_name: layerpeft://gsm8k_train.jsonl
columns: {{prompt: "Question: {{question}}", completion: " {{answer}}"}}
output_dir: whole
layerpeft: {{method: scale, select: {{by: gradient_norm, keep: 2, num_batches: 1}}, target_modules: [q_proj, down_proj]}}
max_steps: 4
save_steps: 2
save_strategy: steps
max_train_samples: 16
per_device_train_batch_size: 2
max_length: 48
learning_rate: 0.05
bf16: false
"""


@pytest.fixture(autouse=True)
def scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    add(LayerScaleConfig)
    yield
    del METHODS[LayerScaleConfig.method]
    for table in (peft.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del table[Kind.LAYER_SCALE]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=make_batches()[0]["input_ids"]).logits


@pytest.mark.parametrize("select", ["last:2", "all", BY_GRADIENT, BY_GRADIENT | {"reselect_steps": 2}], ids=str)
def test_it_trains_what_was_picked_and_nothing_else(select: Any) -> None:
    config = LayerScaleConfig(select=select, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = layerpeft.get_peft_model(llama(), config)
    before = {clean(n): p.clone() for n, p in model.named_parameters()}
    optimizer = adamw(model)
    for batch in make_batches()[:4]:
        step(model, optimizer, batch)
    layerpeft.check_trained(model)
    record = model.peft_config["default"]._layerpeft
    moved = {clean(n) for n, p in model.named_parameters() if not torch.equal(p, before[clean(n)])}
    trained = {i for i, n in record.steps_trained.items() if n}
    assert trained == set(record.selection.layers) or record.schedule is not None
    picked = [t for t in record.selection.targets if int(t.split(".")[2]) in trained]
    assert {n.removeprefix("base_model.model.") for n in moved} == {f"{t}.ia3_l.default" for t in picked}
    model.save_pretrained("adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["peft_type"] == "IA3"
    wanted = logits(model)
    for loaded in (peft.PeftModel.from_pretrained(llama(), "adapter"), layerpeft.load("adapter", llama())):
        assert torch.equal(logits(loaded), wanted)
    assert [r.steps for r in layerpeft.layer_report(loaded).rows] == [record.steps_trained.get(i, 0) for i in range(4)]


def test_what_would_not_train_is_refused() -> None:
    config = LayerScaleConfig(select="last:2", target_modules=["q_proj"])
    model = layerpeft.get_peft_model(llama(), config)
    optimizer = adamw(model)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    with pytest.raises(TrainingError, match="requires_grad is switched off for ia3_l"):
        step(model, optimizer, make_batches()[0])
    with pytest.raises(ConfigError, match="r=4: LoRA's own"):
        LayerScaleConfig(select="all", r=4)


def test_it_is_planned_and_fitted_without_a_rank() -> None:
    config = LayerScaleConfig(select="all", target_modules=["q_proj"])
    found = layerpeft.plan(llama(num_hidden_layers=2), config, batch_size=1, length=8)
    assert found.trainable == 2 * 32 and all(row.trainable == 32 for row in found.rows)
    with pytest.raises(ConfigError, match="one layer, one row at a time"):
        fit(llama(num_hidden_layers=2), config, 1000, batch_size=1, length=8)


def test_a_recipe_names_it_and_resumes_as_if_unbroken(capsys: pytest.CaptureFixture[str]) -> None:
    Path("scale.yaml").write_text(RECIPE.format(base=short_llama(3)))
    assert main(["plan", "scale.yaml", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    whole = run(load_recipe("scale.yaml"), print)
    trained = load_file("whole/adapter_model.safetensors")
    assert planned["trainable"] == sum(t.numel() for t in trained.values()) and len(trained) == 4
    assert sum(r.steps == 4 for r in whole.report.rows) == 2
    run(load_recipe("scale.yaml", ["output_dir=again", "resume_from_checkpoint=whole/checkpoint-2"]), print)
    for name in ("adapter_model.safetensors", "layers.csv"):
        assert Path("whole", name).read_bytes() == Path("again", name).read_bytes()
    bad = "layerpeft.r=4"
    assert main(["plan", "scale.yaml", bad]) == 2 and "LoRA's own" in capsys.readouterr().err
