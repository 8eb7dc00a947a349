"""What training the upper part alone takes, and filling what enters it; and the largest top part of a model that does not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerpeft import LayerFullConfig, LayerLoraConfig
from layerpeft.planning.fit import fit
from layerpeft.planning.plan import apart_bytes, plan
from layerpeft.planning.trace import Step
from layerpeft.recipe import plan as recipe_plan
from layerpeft.recipe.plan import forecast
from tests.helpers.repeating import repeated
from tests.helpers.short import short_llama

WIDTH, INNER, VOCABULARY = 64, 96, 80
SHAPE = {"batch_size": 1, "length": 16}


def llama(layers: int, tied: bool = False) -> LlamaForCausalLM:
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=tied, **sizes))


def config(select, kind=LayerLoraConfig, **options):
    return kind(select=select, target_modules="all-linear", **({"r": 1} if kind is LayerLoraConfig else {}), **options)


@pytest.mark.parametrize(
    ("kind", "again", "tied"),
    [
        (LayerLoraConfig, True, True),
        *map(
            repeated, [(LayerLoraConfig, False, False), (LayerFullConfig, True, False), (LayerFullConfig, False, True)]
        ),
    ],
)
def test_the_upper_part_alone_takes_what_a_model_of_as_many_layers_takes(kind, again, tied):
    found = plan(llama(3, tied), config("last:2", kind, prefix_cache="disk"), checkpointing=again, **SHAPE)
    short = plan(llama(2, tied), config({"layers": [0, 1]}, kind), checkpointing=again, **SHAPE)
    takes = found.prefix.apart.training
    assert (
        takes == (pytest.approx(short.peak_bytes, rel=0.02) if again else short.peak_bytes) and takes < found.peak_bytes
    )
    layer = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH)
    assert found.rows[0].weight_bytes == layer
    made = found.prefix.apart.filling - layer - 4 * VOCABULARY * WIDTH
    states = 4 * 16 * WIDTH
    assert 2 * states < made < 16 * states  # what enters a layer and leaves it, and what it makes meanwhile
    assert "nothing below layer 1 need be loaded: training what lies above takes" in str(found)
    assert plan(llama(3), config("last:2", prefix_cache="memory"), **SHAPE).prefix.apart is None


@pytest.mark.parametrize(
    ("asked", "count", "stays"),
    map(repeated, [("last:1", 1, True), ("last:4", 2, False), ({"by": "gradient_norm", "keep": 3}, 2, False)]),
)
def test_of_a_model_that_does_not_fit_the_largest_top_part_is_proposed(asked, count, stays):
    def takes(layers):
        how = {**SHAPE, "optimizer": "adamw_torch", "checkpointing": True, "step": Step()}
        return apart_bytes(llama(6), config(f"last:{layers}", prefix_cache="disk"), **how).most

    most = takes(count)
    limit = most + 1000
    found = fit(llama(6), config(asked), limit, checkpointing=True, **SHAPE)
    assert found.apart is not None and found.apart.most == most < limit < found.plan.peak_bytes
    assert stays or limit < takes(count + 1)
    assert found.settings.get("layerpeft.select") == (None if stays else f"last:{count}")
    assert found.settings["layerpeft.prefix_cache"] == "disk" and found.config.r == 1
    assert found.gave_up[0].startswith(f"what lies below layer {6 - count}: it is filled ahead")


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_gets_two_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_plan, "_packing", lambda: None)  # or it would fit in 4 bit
    words = [f"model_name_or_path={short_llama(6)}", "max_train_samples=4", "max_eval_samples=1", "max_length=96"]
    words += [f"output_dir={tmp_path}/out", "per_device_train_batch_size=1", "layerpeft.select=last:3"]
    least = forecast("quickstart", [*words, "layerpeft.select=last:1", "layerpeft.prefix_cache=disk"]).plan.prefix.apart
    assert least is not None
    found = forecast("quickstart", words, f"{least.most + 1000}B")
    assert found.before is not None and found.before.startswith("layerpeft prefill quickstart ")
    assert found.command == found.before.replace(" prefill ", " train ")
    assert " layerpeft.select=last:1 layerpeft.prefix_cache=disk" in found.before
    assert str(found).endswith(f"to train this:\n  {found.before}\n  {found.command}")
