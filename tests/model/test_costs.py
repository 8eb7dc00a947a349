"""Operations in closed form beside traced steps, for every kind of model, method and way to recompute."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerpeft import LayerFullConfig, LayerLoraConfig, get_peft_model, layer_map
from layerpeft.errors import LayerMapError
from layerpeft.model.costs import Load, costs_of
from layerpeft.planning.trace import trace
from tests.helpers.models import MODELS, batch
from tests.helpers.passes import beginning_at
from tests.helpers.repeating import some

NAMES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "starcoder2", "gpt2", "gpt_neox",
    "opt", "bloom", "falcon", "mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "bert", "roberta", "distilbert", "modernbert", "vit",
    "dinov2",
]  # fmt: skip
REASONS = {
    **dict.fromkeys(("mamba", "jamba", "qwen3_next", "zamba2"), "does not follow from shapes alone"),
    **dict.fromkeys(("t5", "bart", "whisper"), "cross_attention"),
    "gemma3_vlm": "several stacks", "deberta_v2": "multiplies by positions besides", "nanogpt": "get_output_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("name", some(NAMES, ["gpt2", "mixtral", "olmo2"]))
def test_operations_are_those_of_a_traced_step(name):
    for kind, options in ((LayerLoraConfig, {"r": 4, "target_modules": "all-linear"}), (LayerFullConfig, {})):
        for chosen in ([2], [0, 2]):
            model = MODELS[name]()
            layers, config = layer_map(model), kind(select=chosen, **options)
            targets, work = config.targets_in(model, layers), config.works_by.work(config)
            real, given = get_peft_model(model, config).train(), batch(name, model)
            for again in (False, True):
                if again:
                    real.get_base_model().gradient_checkpointing_enable()
                found = costs_of(model, layers, targets, Load(2, 8, again), work)
                counted = trace(real, 2, 8, inputs=given).flops
                assert found.of(chosen) == pytest.approx(counted, rel=0.02), (kind, chosen, again)
                with beginning_at(min(chosen), real, layers, given):
                    later = trace(real, 2, 8, inputs=given).flops
                assert replace(found, whole=0.0).of(chosen) == pytest.approx(later, rel=0.02), (kind, chosen, again)
                third = replace(found, whole=1 / 3).of(chosen)  # of three epochs the first is whole
                assert third == pytest.approx((counted + 2 * later) / 3, rel=0.02)


@pytest.mark.parametrize("name", some(REASONS, ["jamba", "deberta_v2", "nanogpt"]))
def test_what_does_not_follow_from_shapes_is_said(name):
    model = MODELS[name]()
    layers = layer_map(model)
    with pytest.raises(LayerMapError, match=REASONS[name]):
        costs_of(model, layers, layers.targets)
