"""The cut under stock PEFT configs, and where it steps aside because something below needs a gradient."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from layerpeft import LayerLoraConfig, get_peft_model, plan
from layerpeft.training import backward
from tests.helpers.models import NanoGPT
from tests.training import test_backward
from tests.training.test_backward import ALL, TOP, llama, traffic

UP = r"model\.layers\.[45]\..*(q_proj|v_proj)"
STOCK = {
    "LoRA": peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[4, 5], layers_pattern="layers"),
    "DoRA": peft.LoraConfig(target_modules=UP, use_dora=True),
    "LoRA on parameters": peft.LoraConfig(
        target_modules=[], target_parameters=[f"model.layers.{i}.mlp.up_proj.weight" for i in (4, 5)]
    ),
    "LoRA and the head": peft.LoraConfig(target_modules=UP, modules_to_save=["lm_head"]),
    "LoRA and all biases": peft.LoraConfig(target_modules=UP, bias="all"),
    "IA3": peft.IA3Config(target_modules=UP, feedforward_modules=[]),
    "LoHa": peft.LoHaConfig(target_modules=UP),
    "OFT": peft.OFTConfig(target_modules=UP, oft_block_size=8, r=0),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=UP, total_step=10),
    "VeRA": peft.VeraConfig(target_modules=r"model\.layers\.[45]\..*q_proj", r=4),
    "VBLoRA": peft.VBLoRAConfig(target_modules=UP.replace("v_proj", "o_proj"), vector_length=16, num_vectors=8, topk=2),
    "norms": peft.LNTuningConfig(target_modules=r"model\.layers\.[45]\.input_layernorm"),
    "adaption prompt": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
}
# what trains below the layers, and what the reason names
EMBEDDINGS = {
    "embeddings": (
        peft.LoraConfig(target_modules=UP, modules_to_save=["embed_tokens"]),
        "embed_tokens.modules_to_save",
    ),
    "new tokens": (peft.LoraConfig(target_modules=UP, trainable_token_indices=[1, 2]), "embed_tokens.token_adapter"),
    "LoRA on embeddings": (peft.LoraConfig(target_modules=UP + "|.*embed_tokens"), "embed_tokens.lora_embedding_A"),
    "prompt tuning": (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "prompt_encoder"),
    "p-tuning": (
        peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
        "prompt_encoder",
    ),
}
KINDS = pytest.mark.parametrize(
    "switch", [test_backward.as_trl_does, test_backward.reentrant_twice], ids=["non-reentrant", "reentrant"]
)


def both(config: peft.PeftConfig, switch, build=llama):
    """(model, traffic, gradients) of one step, ours and plain PEFT's."""
    found = []
    for make in (get_peft_model, peft.get_peft_model):
        torch.manual_seed(3)
        model = make(build(), copy.deepcopy(config)).train()
        switch(model)
        seen = traffic(model)
        found.append((model, seen, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (model, ours, mine), (_, theirs, reference) = found
    assert mine.keys() == reference.keys() and mine
    assert all(g is not None and torch.equal(g, reference[n]) for n, g in mine.items())
    assert theirs == (ALL, ALL, ALL)
    return model, ours


@pytest.mark.spread(2)
@KINDS
@pytest.mark.parametrize("name", STOCK)
def test_stock_configs_are_cut(name, switch):
    model, seen = both(STOCK[name], switch)
    assert seen == (ALL, TOP, TOP)
    assert backward.where(model) == backward.Stop(4, "layer 4 is the lowest that trains")


@pytest.mark.spread(2)
@KINDS
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_it_steps_aside_where_something_below_trains(name, switch):
    config, reason = EMBEDDINGS[name]
    model, seen = both(config, switch)
    assert seen == (ALL, ALL, ALL)
    stop = backward.where(model)
    assert stop.layer is None and reason in stop.why and stop.why.endswith("the layers, trains")


@pytest.mark.spread(2)
@KINDS
@pytest.mark.parametrize("together", [False, True])
def test_tied_heads(switch, together):
    def tied() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, use_cache=False))

    config = peft.LoraConfig(target_modules=UP, modules_to_save=["lm_head"], ensure_weight_tying=together)
    model, seen = both(config, switch, tied)
    # PEFT unties a head that it trains, unless it is told not to
    assert seen == ((ALL, ALL, ALL) if together else (ALL, TOP, TOP))
    assert backward.where(model).layer == (None if together else 4)


@pytest.mark.spread(2)
@KINDS
def test_our_own_config_steps_aside_too(switch):
    for options in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": {"embed_tokens": [1, 2]}}):
        model = test_backward.wrap(llama(), **options)
        switch(model)
        assert traffic(model) == (ALL, ALL, ALL)
        below = [p for n, p in model.named_parameters() if "embed_tokens" in n and p.requires_grad]
        assert below and all(p.grad is not None and p.grad.any() for p in below)
        assert "embed_tokens" in backward.where(model).why


def test_the_plan_says_so():
    config, reason = EMBEDDINGS["prompt tuning"]
    found = plan(llama(width=8), copy.deepcopy(config), batch_size=1, length=4)
    assert found.stop.layer is None and reason in found.stop.why
    assert f"down to the bottom ({found.stop.why})" in str(found)


def test_what_is_and_what_is_not_watched():
    for config in (LayerLoraConfig(target_modules=["q_proj"]), peft.LoraConfig(target_modules=["q_proj"])):
        model = get_peft_model(llama(), config)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert backward.install(model) == backward.Stop(None, "the first layer trains")
    frozen = llama().requires_grad_(False)
    assert backward.install(frozen) == backward.Stop(None, "nothing in these layers trains")
    assert not frozen._forward_pre_hooks
    model = test_backward.wrap(llama())
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    assert backward.install(model).layer == 4 and backward.install(model, "model.layers").layer == 4
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before and sum(before) == 1


class Container(nn.Module):
    """Checkpoints its blocks itself in the reentrant way, hooks on them included, as older modelling files do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NanoGPT()
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = checkpoint

    def enable_input_require_grads(self) -> None:
        def make_inputs_require_grads(_module, _args, output):
            output.requires_grad_(True)

        make_inputs_require_grads.__module__ = "transformers.modeling_utils"
        self.inner.transformer["wte"].register_forward_hook(make_inputs_require_grads)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        parts = self.inner.transformer
        x = parts["wte"](input_ids)
        for block in parts["h"]:
            x = checkpoint(block, x, use_reentrant=True)
        return self.inner.lm_head(parts["ln_f"](x)).pow(2).mean()


def test_blocks_that_a_container_checkpoints_in_the_reentrant_way_are_not_starved():
    model = Container().requires_grad_(False)
    last = model.inner.transformer["h"][2].requires_grad_(True)
    backward.install(model)
    model.enable_input_require_grads()
    model(test_backward.X).backward()
    assert all(p.grad is not None for p in last.parameters())
