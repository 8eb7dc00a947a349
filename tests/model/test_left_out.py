"""Stacks and linears that PEFT, or the model itself, treats apart: mergers, Mamba's projections, weights without a call."""

import ast
import re

import pytest
import torch
import transformers as tf

import layerpeft
from layerpeft import LayerGaloreConfig, LayerLoraConfig, get_peft_model, layer_map
from layerpeft.errors import ScoreError, TrainingError
from tests.helpers.models import MODELS, loss_of
from tests.training.test_backward_conditional import qwen3_vl

IDS = torch.arange(3, 15)[None]
_SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}
_SSM = {**_SMALL, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_FALCON = {**_SMALL, **_ATTENTION, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}


def gemma3n():
    """Tiny; the weights of `correction_coefs` are used without a call of the module."""
    sizes = {**_SMALL, **_ATTENTION, "num_hidden_layers": 4, "vocab_size_per_layer_input": 100, "head_dim": 8}
    sizes |= {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2}
    kinds = ["sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    config = tf.Gemma3nTextConfig(**sizes, layer_types=kinds, activation_sparsity_pattern=[0.0] * 4)
    return tf.Gemma3nForCausalLM(config)


MAMBAS = {
    "mamba": MODELS["mamba"],
    "mamba2": lambda: tf.Mamba2ForCausalLM(tf.Mamba2Config(**_SSM)),
    "falcon_mamba": lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**_SMALL, state_size=4)),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(tf.FalconH1Config(**_FALCON)),
    "jamba": MODELS["jamba"],
    "zamba2": MODELS["zamba2"],
}
LEFT = {
    "mamba": {"out_proj", "dt_proj"},
    "falcon_mamba": {"out_proj", "dt_proj"},
    "jamba": {"dt_proj"},
    "zamba2": set(),
}


@pytest.mark.parametrize("name", MAMBAS)
def test_all_linear_leaves_out_what_peft_refuses_and_says_so(name, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    base = MAMBAS[name]()
    layers = layer_map(base)
    linears = {t.name for t in layers.targets if t.kind == "linear" and t.layer == len(layers) - 1}
    model = get_peft_model(base, LayerLoraConfig(select="last:1", r=2, target_modules="all-linear")).train()
    left = LEFT.get(name, {"out_proj"})
    targets = set(model.peft_config["default"]._layerpeft.selection.targets)
    assert linears - targets == {n for n in linears if n.rpartition(".")[2] in left} and targets
    said = [r.getMessage() for r in caplog.records if "all-linear leaves out" in r.getMessage()]
    assert {leaf for s in said for leaf in s.partition("out ")[2].partition(":")[0].split(", ")} == left
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layerpeft.check_trained(model)


def test_the_tower_is_meant_and_not_the_mergers_beside_it():
    base = qwen3_vl()
    found = layer_map(base, "vision")
    assert found.stack == "model.visual.blocks" and len(found) == 3
    assert "vision=model.visual.blocks" in found.stacks and "model.visual.deepstack_merger_list" in found.stacks
    assert layer_map(base).stack == "model.language_model.layers"


def written(message):
    """What a message says to write as `exclude_modules`, as it is printed."""
    (value,) = re.findall(r"exclude_modules=(\[[^\]]*\])", message)
    return ast.literal_eval(value)


@pytest.mark.spread(4)
@pytest.mark.parametrize("kind", [LayerLoraConfig, LayerGaloreConfig])
@pytest.mark.parametrize("select", ["last:3", {"by": "gradient_norm", "keep": 2}], ids=["last", "waits"])
def test_what_never_gets_a_gradient_is_named_with_a_cure_that_works(kind, select):
    left: list[str] = []
    said = []
    while len(said) < 3:
        config = kind(select=select, r=2, target_modules="all-linear", exclude_modules=left or None)
        model = get_peft_model(gemma3n(), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
        try:
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            break
        except (TrainingError, ScoreError) as error:
            said.append(str(error))
            left += written(said[-1])
    layerpeft.check_trained(model)
    assert "altup.correction_coefs" in said[0] and left[0] == "correction_coefs"
    # those have a gradient of zero until the tiny model has left its start
    assert said[1:] == [] or left[1:] == ["per_layer_input_gate", "per_layer_projection"]


def test_full_names_are_written_where_others_of_the_name_train():
    model = get_peft_model(MODELS["llama"](), LayerLoraConfig(select="last:2", r=2, target_modules=["q_proj"])).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for dropped in ("layers.2.", ""):
        loss_of("llama", model).backward()
        for name, parameter in model.named_parameters():
            parameter.grad = None if dropped in name else parameter.grad
        with pytest.raises(TrainingError, match="no gradient arrived") as error:
            optimizer.step()
        if dropped:
            assert written(str(error.value)) == ["model.layers.2.self_attn.q_proj"]
        assert ("zero_grad" in str(error.value)) is not bool(dropped)
