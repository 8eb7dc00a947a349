"""Faults that were once found by trying to break the package; each must stay mended."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from layerpeft import LayerLoraConfig, check_trained, get_peft_model, layer_report, plan, score_layers
from layerpeft.errors import ConfigError, SelectionError, TrainingError
from layerpeft.selection.select import Select
from tests.helpers.models import Moody

X = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(4))
BATCH = {"input_ids": X, "labels": X}
BY_NORM = {"by": "gradient_norm", "keep": 2}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def config(select):
    return LayerLoraConfig(select=select, r=4, target_modules=["q_proj", "v_proj"])


def stock(**options):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)


def optimizer_of(model, rate=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)


def step(model, optimizer) -> None:
    model.train()
    model(**BATCH).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def wrapped_layers(model) -> set[int]:
    return {int(n.split("layers.")[1].split(".")[0]) for n, _ in model.named_parameters() if "lora_A" in n}


@pytest.mark.parametrize("second", ["unload", "delete"])
def test_a_pending_choice_ends_with_its_adapter(second):
    model = get_peft_model(llama(), config(BY_NORM))
    if second == "unload":
        model = peft.get_peft_model(model.unload(), stock())
    else:
        model.delete_adapter("default")
        model.add_adapter("default", stock())
        model.set_adapter("default")
    step(model, optimizer_of(model))
    assert wrapped_layers(model) == {0, 1, 2, 3}


def test_another_choice_after_unload_is_followed_alone():
    model = get_peft_model(llama(), config("last:1"))
    model = get_peft_model(model.unload(), config("first:1"))
    optimizer = optimizer_of(model)
    step(model, optimizer)
    check_trained(model)
    assert wrapped_layers(model) == {0}


def test_an_optimizer_built_before_wrapping_is_refused():
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters(), 1e-2)
    model = get_peft_model(base, config("last:2"))
    with pytest.raises(TrainingError, match="holds none of the tensors that were chosen"):
        step(model, optimizer)


def test_another_adapter_stays_inactive_where_the_choice_falls_elsewhere():
    model = get_peft_model(llama(), config(BY_NORM))
    model.add_adapter("other", stock(init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        before = model(input_ids=X).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-9)
    step(model, optimizer)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=X).logits, before, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)


def test_names_in_parameter_groups_follow_the_choice():
    model = get_peft_model(llama(), config(BY_NORM))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.items(), 1e-2)
    step(model, optimizer)
    group = optimizer.param_groups[0]
    assert len(group["params"]) == len(group["param_names"]) == 8
    assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


def test_expert_in_a_name_excuses_nobody():
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gemma_expert = llama()

        def forward(self, **inputs):
            return self.gemma_expert(**inputs)

    model = get_peft_model(Outer(), config("last:1"))
    groups = [
        {"params": [p], "lr": 0.0 if "q_proj" in n else 1e-2} for n, p in model.named_parameters() if p.requires_grad
    ]
    with pytest.raises(TrainingError, match="q_proj"):
        step(model, torch.optim.AdamW(groups))


def test_block_level_dropout_is_off_while_scoring_under_checkpointing():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=64, dropout=0.3, **sizes)).train()
    plain = score_layers(model, batches=[BATCH], exact=True, progress=False)
    model.gradient_checkpointing_enable()
    assert score_layers(model, batches=[BATCH], exact=True, progress=False).values == pytest.approx(
        plain.values, rel=1e-5
    )
    assert model.model.decoder.layers[0].dropout == 0.3


def test_a_users_hook_on_a_target_does_not_change_its_score():
    model = llama()
    plain = score_layers(model, batches=[BATCH], exact=True, progress=False, target_modules=["q_proj"])
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _m, _a, y: y * 10)
    model.model.layers[1].self_attn.q_proj.weight.data /= 10
    hooked = score_layers(model, batches=[BATCH], exact=True, progress=False, target_modules=["q_proj"])
    assert hooked.values[1] == pytest.approx(10 * plain.values[1], rel=1e-3)
    assert hooked.values[3] == pytest.approx(plain.values[3], rel=1e-3)


def test_replace_keeps_the_batches():
    with_batches = LayerLoraConfig(select=BY_NORM, batches=[BATCH])
    assert not dataclasses.replace(with_batches, r=8).is_deferred
    assert copy.deepcopy(with_batches).batches is with_batches.batches
    assert pickle.loads(pickle.dumps(with_batches)).batches is None  # batches are never written


def test_optimizers_with_closures():
    model = get_peft_model(llama(), config("last:2")).train()
    optimizer = optimizer_of(model)

    def closure():
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    check_trained(model)
    assert [r.steps for r in layer_report(model).rows] == [0, 0, 2, 2]


def test_a_second_adapter_may_train_after_the_first():
    model = get_peft_model(llama(), config("last:2"))
    step(model, optimizer_of(model))
    model.add_adapter("b", stock())
    model.set_adapter("b")
    step(model, optimizer_of(model))
    check_trained(model)
    assert [r.steps for r in layer_report(model).rows] == [0, 0, 1, 1]


def test_an_optimizer_without_a_learning_rate():
    from transformers import Adafactor

    model = get_peft_model(llama(), config("last:2"))
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad], lr=None, relative_step=True)
    step(model, optimizer)
    check_trained(model)
    assert [r.steps for r in layer_report(model).rows] == [0, 0, 1, 1]


@pytest.mark.parametrize("value", [range(2, 4), (2, 3), [np.int64(2), np.int64(3)], np.array([2, 3]), {3, 2}])
def test_other_libraries_numbers_are_read_and_written_as_plain_ones(value):
    parsed = Select.parse({"layers": value})
    assert [type(v) for v in parsed.to_dict()["layers"]] == [int, int] and parsed.layers == [2, 3]


@pytest.mark.parametrize("value", [{"layers": "all", "stack": 3}, b"ab"])
def test_nonsense_is_refused(value):
    with pytest.raises(SelectionError):
        Select.parse(value)


def test_a_plan_that_cannot_be_made_says_so(tmp_path):
    with pytest.raises(ConfigError, match="Moody cannot be traced"):
        plan(Moody(), LayerLoraConfig(select="last:1", target_modules="all-linear"))
    with pytest.raises(ConfigError, match="no model config at"):
        plan(tmp_path, LayerLoraConfig())
