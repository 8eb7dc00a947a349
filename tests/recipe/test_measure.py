"""One real step of a recipe beside its plan."""

from __future__ import annotations

import json

import pytest

from layerpeft import LayerLoraConfig, plan
from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe.measure import Measured, Part, measure
from tests.helpers.models import MODELS
from tests.helpers.repeating import some
from tests.helpers.short import short_llama

pytestmark = pytest.mark.usefixtures("shallow")

FEW = ["max_train_samples=16", "max_eval_samples=2", "layerpeft.select=last:2"]
CHECKPOINTING = ["gradient_checkpointing=true", "gradient_accumulation_steps=4"]
REENTRANT = ["gradient_checkpointing=true", "gradient_checkpointing_kwargs={use_reentrant: true}"]
PACKING = ["packing=true", "max_length=64", "optim=lion_8bit"]
MIXED = ["bf16=true", "use_cpu=true", "optim=adafactor"]
LOW = ["dtype=bfloat16", "optim=adamw_8bit"]
EAGER = ["attn_implementation=eager", "layerpeft.use_dora=true"]
BY_SCORE = ["layerpeft.select={by: gradient_norm, keep: 2, num_batches: 1}", "optim=paged_adamw_32bit"]
FOUR_BIT = "model_init_kwargs={quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4}}"
CASES = {
    "plain": ("quickstart", FEW),
    "checkpointing": ("quickstart", [*FEW, *CHECKPOINTING]),
    "reentrant": ("quickstart", [*FEW, *REENTRANT]),
    "packing": ("quickstart", [*FEW, *PACKING]),
    "mixed precision": ("quickstart", [*FEW, *MIXED]),
    "low precision": ("quickstart", [*FEW, *LOW]),
    "eager": ("quickstart", [*FEW, *EAGER]),
    "four bits": ("quickstart", [*FEW, FOUR_BIT]),
    "by score": ("quickstart", [*FEW[:2], *BY_SCORE]),
    "classes": ("revision", ["layerpeft.select=last:2", "per_device_train_batch_size=4"]),
    # by themselves above, and in pairs here
    "checkpointing, packing": ("quickstart", [*FEW, *CHECKPOINTING, *PACKING]),
    "reentrant, mixed precision": ("quickstart", [*FEW, *REENTRANT, *MIXED]),
    "eager, low precision": ("quickstart", [*FEW, *EAGER, *LOW]),
    "by score, four bits": ("quickstart", [*FEW[:2], *BY_SCORE, FOUR_BIT]),
}


@pytest.mark.parametrize("case", some(CASES, ["by score, four bits"]))
def test_what_was_predicted_is_what_is_counted(case, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    name, settings = CASES[case]
    found = measure(name, [*settings, f"model_name_or_path={short_llama(3)}"])
    assert [part.name.split(",")[0] for part in found.parts] == [
        "weights", "gradients", "optimizer", "activations", "operations",
    ]  # fmt: skip
    for part in found.parts:
        assert part.measured > 0
        assert part.ratio == pytest.approx(1, rel=0.15 if part.name == "activations" else 0.02), part
    assert found.loss > 0 and not list(tmp_path.iterdir())


def test_the_command_prints_predicted_beside_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "quickstart", *FEW, "per_device_train_batch_size=2", "max_length=48"]
    words.append("layerpeft.target_modules=[q_proj]")  # as each module more is traced like it
    words.append(f"model_name_or_path={short_llama(3)}")
    assert main([*words, "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("one step on 2 rows of 48 tokens"))
    assert lines[start + 1].split() == ["predicted", "measured", "ratio"]
    assert [line.split()[0].strip(",") for line in lines[start + 2 :]] == [
        "weights", "gradients", "optimizer", "activations", "operations",
    ]  # fmt: skip
    assert main([*words, "--json"]) == 0
    limit = json.loads(capsys.readouterr().out)["peak_bytes"] - 1
    assert main([*words, "--measure", "--fit", str(limit), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gave_up"] and found["measured"]["shape"][0] == found["per_device_train_batch_size"]
    assert sum(part["measured"] for part in found["measured"]["parts"][:4]) <= 1.02 * limit


def test_a_ratio_shows_what_is_wrong():
    assert (
        Part("weights", 150, 100).ratio == 1.5 and Part("x", 0, 0).ratio == 1 and Part("x", 1, 0).ratio == float("inf")
    )
    found = plan(MODELS["llama"](), LayerLoraConfig(select={"by": "outliers", "keep": 1}), batch_size=1, length=2)
    text = str(Measured((Part("weights", 150, 100),), (1, 2), found, 1.0))
    assert "1.500" in text and "predicted for: which 1 of 3 layers is not known yet" in text


def test_a_broken_recipe_is_refused_before_anything_is_loaded():
    with pytest.raises(RecipeError, match="asks for 40 layers of 5"):
        measure("quickstart", ["layerpeft.select=last:40"])
