"""The largest choice that fits, and the command that trains it."""

from __future__ import annotations

import json
import shlex

import pytest

from layerpeft import LayerLoraConfig
from layerpeft.cli import main
from layerpeft.errors import ConfigError
from layerpeft.planning.fit import fit
from layerpeft.planning.plan import plan
from layerpeft.planning.trace import Step
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import layer_config
from tests.helpers.loops import llama
from tests.helpers.repeating import repeated
from tests.helpers.short import short_llama

pytestmark = pytest.mark.usefixtures("shallow")

FEW = ["max_steps=1", "max_train_samples=16", "max_eval_samples=2", "sample_tokens=0", "warmup_steps=0"]
FEW.append("layerpeft.target_modules=[q_proj]")  # what is traced goes with the number of modules


def test_layers_are_kept_first_then_rank_then_rows_then_time():
    model = llama(num_hidden_layers=2)
    config = LayerLoraConfig(select="last:2", r=8, lora_alpha=16, target_modules=["q_proj"])

    def fitted(limit):
        return fit(model, config, limit, batch_size=2, length=64, step=Step(accumulation=2))

    whole = fitted("1GB")
    assert whole.gave_up == () and whole.config is config and whole.settings == {}
    seen, room = [], whole.plan.peak_bytes
    while (found := fitted(room - 1)).apart is None:
        assert found.plan.peak_bytes < room
        assert found.batch_size * found.accumulation == 4  # the same step
        assert found.config.lora_alpha == 2 * found.config.r  # the same scale
        seen.append((sum(r.trains for r in found.plan.rows), found.config.r, found.batch_size, not found.checkpointing))
        room = found.plan.peak_bytes
    assert (
        found.apart.most < room and "filled ahead" in found.gave_up[0]
    )  # then the upper layer alone, without what lies below
    assert seen == sorted(seen, reverse=True) and len(seen) > 4
    assert {s[0] for s in seen} == {2, 1} and {s[1] for s in seen} == {8, 4} and {s[2] for s in seen} == {2, 1}
    with pytest.raises(ConfigError, match="is no size"):
        fit(model, config, "24 parsecs")


def test_what_is_given_up_last_is_won_back():
    """Where a layer has to go anyway, rank and rows are not given up for nothing."""
    model, options = llama(num_hidden_layers=2), {"select": "last:2", "target_modules": "all-linear"}
    config = LayerLoraConfig(r=8, **options)
    room = plan(model, LayerLoraConfig(r=4, **options), batch_size=1, length=64)
    limit = min(room.peak_bytes, room.peak_bytes - room.kept.peak + room.recomputed.peak) - 1
    found = fit(model, config, limit, batch_size=1, length=64)
    assert sum(r.trains for r in found.plan.rows) == 1 and found.config.r == 8
    assert found.gave_up[0] == "1 instead of 2 layers" and found.plan.peak_bytes <= limit


@pytest.mark.parametrize(
    "select",
    [
        repeated({"by": "gradient_norm", "keep": "auto"}),
        {"by": "gradient_norm", "keep": "auto", "pick": "split", "split": "ir_tuning", "window": [0.3, 0.6]},
        repeated({"by": "outliers", "keep": "75%", "M": 5}),
        repeated("first:2"),
        repeated("all"),
    ],
)
def test_fewer_layers_are_chosen_in_the_same_way(select):
    shallow = short_llama(3)
    config = LayerLoraConfig(select=select, r=4, target_modules="all-linear")
    weights = plan(shallow, config, batch_size=1, length=8)
    limit = weights.peak_bytes - (weights.kept.peak - weights.recomputed.peak) - 100_000
    found = fit(shallow, config, limit, batch_size=1, length=8)
    chosen = [r.layer for r in found.plan.rows if r.trains]
    before = sum(r.trains for r in weights.rows)
    assert 0 < len(chosen) < before and found.gave_up[0] == f"{len(chosen)} instead of {before} layers"
    if isinstance(select, dict):
        assert found.config.select["keep"] == len(chosen) and found.config.select["by"] == select["by"]
        assert LayerLoraConfig(select=found.config.select, r=4).select == found.config.select
    else:
        assert chosen == list(range(before - len(chosen), before))


@pytest.mark.parametrize(
    "choice", [repeated("layerpeft.select=last:2"), "layerpeft.select={by: gradient_norm, keep: 2, num_batches: 1}"]
)
def test_the_command_that_is_printed_trains_what_fits(choice, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "quickstart", *FEW, "micro_batch_size=2", "output_dir=out", "max_length=64", choice]
    words.append(f"model_name_or_path={short_llama(3)}")
    assert main([*words, "--json"]) == 0
    limit = f"{0.75 * json.loads(capsys.readouterr().out)['peak_bytes'] / 1e6:.1f}MB"
    assert main([*words, "--fit", limit, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gave_up"] and found["plan"]["peak_bytes"] <= float(limit[:-2]) * 1e6
    assert main([*words, "--fit", limit]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1].strip()
    assert command == found["command"] and command.startswith("layerpeft train quickstart ")
    given = shlex.split(command)[2:]
    recipe = load_recipe(given[0], given[1:])
    rows = found["per_device_train_batch_size"]
    assert recipe["per_device_train_batch_size"] == rows
    assert recipe["gradient_accumulation_steps"] * rows == 2
    assert recipe["gradient_checkpointing"] is found["gradient_checkpointing"]
    config = layer_config(recipe)
    assert config.r == found["r"] and config.lora_alpha == 2 * config.r
    assert main(shlex.split(command)[1:]) == 0
    capsys.readouterr()
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    manifest = json.loads((tmp_path / "out" / "layerpeft.json").read_text())
    assert adapter["r"] == found["r"]
    assert len(manifest["selection"]["layers"]) == sum(row["trains"] for row in found["plan"]["rows"])


def test_frozen_layers_are_packed_before_rows_and_time_are_given_up(capsys, tmp_path, monkeypatch):
    """More room than layers and rank need, less than 16-bit frozen layers take: the package's own answer, and it trains."""
    monkeypatch.chdir(tmp_path)
    small = ["max_length=96", "gradient_accumulation_steps=1", "dtype=bfloat16", f"model_name_or_path={short_llama(3)}"]
    words = ["plan", "quickstart", *FEW, *small, "output_dir=out", "layerpeft.select=last:2"]
    assert main([*words, "per_device_train_batch_size=1", "gradient_checkpointing=true", "--json"]) == 0
    least = json.loads(capsys.readouterr().out)["peak_bytes"]  # of 16-bit frozen layers
    limit = least - 200_000
    assert main([*words, "per_device_train_batch_size=2", "--fit", str(limit), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"].get("layerpeft.quantize_frozen") == "nf4", found["settings"]
    assert not {"layerpeft.select", "layerpeft.r"} & set(found["settings"])
    assert any("frozen layers: nf4" in text for text in found["gave_up"])
    assert found["plan"]["peak_bytes"] <= limit
    assert main(shlex.split(found["command"])[1:]) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "out" / "layerpeft.json").read_text())["config"]["quantize_frozen"] == "nf4"


def test_a_size_that_nothing_fits_is_refused(capsys):
    assert main(["plan", "quickstart", "--fit", "1MB", f"model_name_or_path={short_llama(3)}"]) == 2
    said = capsys.readouterr().err
    assert "nothing fits into" in said and "one layer at rank 4, one row at a time" in said


def test_pairs_stay_together_and_count_as_one_row():
    model = llama(num_hidden_layers=2)
    config = LayerLoraConfig(select="last:1", r=4, target_modules=["q_proj"])
    whole = plan(model, config, batch_size=8, length=64, checkpointing=True)
    found = fit(model, config, whole.peak_bytes - 1, batch_size=8, length=64, checkpointing=True, each=2)
    assert found.settings == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert found.gave_up[0].startswith("2 instead of 4 rows at a time") and found.batch_size == 2
    half = plan(model, config, batch_size=4, length=64, checkpointing=True)
    assert found.plan.peak_bytes == half.peak_bytes


def test_the_settings_of_pairs_plan_the_same_again(tmp_path):
    asked = [f"output_dir={tmp_path / 'out'}", "per_device_train_batch_size=4", "max_length=64", "max_train_samples=16"]
    whole = forecast("dpo", asked)
    fitted = forecast("dpo", asked, str(whole.plan.peak_bytes - 1))
    again = forecast("dpo", [*asked, *fitted.changes])
    assert again.plan.peak_bytes == fitted.plan.peak_bytes and again.plan.kept == fitted.plan.kept
