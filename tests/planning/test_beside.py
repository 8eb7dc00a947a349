"""What a trainer holds beside the model: a plan's bytes against those of real models, and which part is what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.integrations.tracing import weight_bytes
from layerpeft.planning.beside import Beside, Other, Writing
from layerpeft.planning.plan import peak_bytes, plan
from layerpeft.planning.trace import Step, counting
from layerpeft.recipe.plan import forecast
from tests.helpers.bounds import PLANNED

pytestmark = pytest.mark.usefixtures("shallow")

LORA = LayerLoraConfig(select="last:1", target_modules="all-linear", r=2)
ROWS, LENGTH = 2, 48


def about(**more: int) -> LlamaConfig:
    sizes = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3}
    return LlamaConfig(**(sizes | {"num_attention_heads": 6, "pad_token_id": 0} | more))


def empty(kind: type, config: LlamaConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(("prompt", "tokens"), [(8, 40), (40, 8)], ids=["writing", "reading"])
def test_answers_take_what_is_measured_while_they_are_written(prompt: int, tokens: int) -> None:
    real = LlamaForCausalLM(about())
    found = plan(real, LORA, batch_size=ROWS, length=prompt + tokens, step=Step(beside=Beside((), Writing(tokens, 2))))
    writer = get_peft_model(real, LORA).eval()
    ids = torch.ones(2 * ROWS, prompt, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "top_k": 0, "top_p": 1.0}
    with counting(writer, (ids, mask)) as live, torch.no_grad():
        writer.generate(input_ids=ids, attention_mask=mask, **how)
    assert found.beside.before == pytest.approx(live.peak, rel=PLANNED)
    cache = 2 * ROWS * (prompt + tokens) * 3 * 2 * 192 * 4  # layers, keys and values, width, float32
    assert f"keys and values {cache / 2**10:.1f} KiB" in found.beside.lines[0] and found.beside.weights == 0


def test_a_teacher_is_there_over_the_pass_and_a_judge_before_it() -> None:
    real, small = LlamaForCausalLM(about()), about(num_hidden_layers=1)
    alone = plan(real, LORA, batch_size=ROWS, length=LENGTH)
    for kind, teaches in ((LlamaForCausalLM, True), (LlamaForSequenceClassification, False)):
        small.num_labels = 1
        other, there = empty(kind, small), kind(small).eval()
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        with counting(there, (ids,)) as live, torch.no_grad():
            there(input_ids=ids, use_cache=False)
        step = Step(beside=Beside((Other("other", other, weight_bytes(other), teaches),)))
        found = plan(real, LORA, batch_size=ROWS, length=LENGTH, step=step)
        weights = sum(t.numel() * t.element_size() for t in there.state_dict(keep_vars=True).values())
        assert found.parts["beside"] == pytest.approx(weights, rel=0.02)
        held = found.beside.teaching if teaches else found.beside.before
        assert held == pytest.approx(live.peak, rel=0.1)
        assert found.kept.peak == (alone.kept.peak + held if teaches else max(alone.kept.peak, held))
        assert found.peak_bytes == alone.peak_bytes + found.beside.weights + found.kept.peak - alone.kept.peak
        how = {"batch_size": ROWS, "length": LENGTH, "optimizer": "adamw_torch", "checkpointing": False}
        assert peak_bytes(real, LORA, **how, step=step) == found.peak_bytes
        assert ("while the model's activations are there" in str(found)) == teaches
        assert "weights beside the model" in str(found) and "weights beside the model" not in str(alone)


def test_plans_of_recipes_say_what_their_trainers_hold(tmp_path: Path) -> None:
    """Answers are as long as the trainer's own setting says, after prompts as they are in the rows."""
    LlamaForSequenceClassification(about(num_labels=1)).save_pretrained(tmp_path / "judge")
    found = forecast("online_dpo", [f"rewards={tmp_path / 'judge'}", "max_new_tokens=16"])
    assert found.plan.beside.weights == pytest.approx((tmp_path / "judge/model.safetensors").stat().st_size, rel=0.02)
    assert "answers, 16 of 16 tokens at once" in str(found) and "beside the model: reward model" in str(found)
    text = str(forecast("grpo", ["gradient_accumulation_steps=2", "max_completion_length=16"]))
    assert "answers, 32 of 16 tokens at once" in text and "reward model" not in text
    assert "rows of 1024 tokens" not in text and "rows of 512 tokens" not in text
    teacher = ["drop=null", "teacher_model_name_or_path=layerpeft://llama-6m"]
    taught = forecast("distillation", teacher)
    assert "beside the model: teacher layerpeft://llama-6m" in str(taught)
    assert taught.plan.peak_bytes == sum(taught.plan.parts.values()) and taught.to_dict()["beside"]["teaching"] > 0
