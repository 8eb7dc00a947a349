"""The plan against the real thing: bytes by part, operations, and where the backward pass stops."""

from __future__ import annotations

import pytest
import torch

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.errors import ConfigError, SelectionError
from layerpeft.fit import fit
from layerpeft.plan import plan, trace
from tests.models import MODELS

NAMES = ["llama", "gpt2", "qwen3", "gemma2", "opt", "phi3", "gpt_neox", "mistral"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_predicts_what_is_measured(name, checkpointing):
    model = MODELS[name]()
    config = LayerLoraConfig(select="last:1", target_modules="all-linear", r=4)
    found = plan(model, config, batch_size=2, length=32, checkpointing=checkpointing)
    real = get_peft_model(model, config).train()
    if checkpointing:
        real.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peak, flops = trace(real, 2, 32)
    ids = torch.zeros(2, 32, dtype=torch.long)
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad])
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    optimizer.step()
    states = sum(t.nbytes for s in optimizer.state.values() for k, t in s.items() if k != "step")
    weights = sum(t.nbytes for t in [*real.parameters(), *real.buffers()])
    assert found.parts["weights"] == pytest.approx(weights, rel=0.02)
    assert found.parts["gradients"] == pytest.approx(gradients, rel=0.02)
    assert found.parts["optimizer"] == pytest.approx(states, rel=0.02)
    assert found.parts["activations"] == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=0.02)
    assert found.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.stop.layer == len(found.rows) - 1 and [r.trains for r in found.rows][-1]
    assert found.flops < found.flops_full


def test_no_weight_is_read_and_the_model_is_left_alone(llama_path, monkeypatch):
    import safetensors

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "safe_open", forbidden)
    found = plan(llama_path, LayerLoraConfig(select={"by": "gradient_norm", "keep": 3}), batch_size=1, length=16)
    assert sum(r.trains for r in found.rows) == 3 and found.rows[0].trains
    assert "is not known yet: the lowest are assumed" in str(found)
    assert "backward pass: down to the bottom (the first layer trains)" in str(found)


def test_fewer_layers_and_a_higher_cut_cost_less(llama_path):
    plans = [plan(llama_path, LayerLoraConfig(select=s), batch_size=2, length=64) for s in ("last:1", "last:6", "all")]
    for cheap, dear in zip(plans, plans[1:], strict=False):
        assert cheap.flops < dear.flops and cheap.peak_bytes < dear.peak_bytes and cheap.trainable < dear.trainable


def test_a_choice_that_does_not_fit_is_refused_before_weights(llama_path):
    with pytest.raises(SelectionError, match="asks for 40 layers of 12"):
        plan(llama_path, LayerLoraConfig(select="last:40"))
    with pytest.raises(ConfigError, match="Did you mean 'adamw_torch'"):
        plan(llama_path, LayerLoraConfig(), optimizer="adamw_trch")


def test_fit_gives_up_time_then_rows_then_rank_then_layers():
    model = MODELS["llama"]()
    config = LayerLoraConfig(select="last:2", r=8, target_modules="all-linear")

    def fitted(limit):
        return fit(model, config, limit, batch_size=4, length=64)

    whole = fitted("1GB")
    assert whole.gave_up == () and whole.config is config
    steps = []
    room = whole.plan.peak_bytes
    for _ in range(8):
        try:
            found = fitted(room - 1)
        except ConfigError as error:
            assert "nothing fits into" in str(error) and "one row at a time" in str(error)
            break
        assert found.plan.peak_bytes < room
        steps.append((found.checkpointing, found.batch_size, found.config.r, sum(r.trains for r in found.plan.rows)))
        room = found.plan.peak_bytes
    assert steps == [(True, 4, 8, 2), (True, 2, 8, 2), (True, 1, 8, 2), (True, 1, 4, 2), (True, 1, 4, 1)]
    with pytest.raises(ConfigError, match="is no size"):
        fit(model, config, "24 parsecs")


def test_the_command_plans_a_recipe(capsys, tmp_path):
    import json

    from layerpeft.cli import main

    assert main(["plan", "quickstart", f"output_dir={tmp_path}", "layerpeft.select=last:2"]) == 0
    text = capsys.readouterr().out
    assert "backward pass: down to layer 10" in text and "together:" in text
    assert main(["plan", "quickstart", "layerpeft.select=last:2", "--fit", "80MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["peak_bytes"] <= 80e6 and found["gave_up"]
    assert main(["plan", "quickstart", "--fit", "1MB"]) == 2
    assert "nothing fits into" in capsys.readouterr().err
