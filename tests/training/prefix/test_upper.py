"""The upper part of a checkpoint alone: what is there of it, and an adapter trained on it fits the whole model."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import core_model_loading

from layerpeft.errors import ConfigError
from layerpeft.model.layers import layer_map
from layerpeft.training.prefix.upper import StandIn, load_upper

SIZES = {"vocab_size": 50, "max_position_embeddings": 32}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, **SIZES}
CUT = 2


def configs():
    still = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return {
        "llama": (transformers.LlamaConfig(**LLAMA), ["q_proj", "down_proj"]),
        "tied": (transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True), ["q_proj"]),
        "windows": (transformers.Gemma3TextConfig(**LLAMA, head_dim=8, num_key_value_heads=1, **windows), ["q_proj"]),
        "gpt2": (transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, **SIZES, **still), ["c_attn"]),
    }


def saved(name, folder):
    torch.manual_seed(0)
    config, targets = configs()[name]
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="8KB")
    return model, targets


def entering(model, ids):
    """What enters the block at the cut."""
    found = []
    block = model.get_submodule(layer_map(model).names[CUT])

    def see(_module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    hook = block.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    hook.remove()
    return found[0]


def fed(model, states):
    """Puts the states there, whatever came."""

    def put(_module, args, kwargs):
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    model.get_submodule(layer_map(model).names[CUT]).register_forward_pre_hook(put, with_kwargs=True)


def trained(model, targets, ids, folder):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=targets, layers_to_transform=[2, 3], fan_in_fan_out="c_attn" in targets)
    peft = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        logits = peft(input_ids=ids).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(folder)


@pytest.mark.parametrize("name", configs())
def test_an_adapter_of_the_upper_part_is_that_of_the_whole_model(name, tmp_path, monkeypatch):
    whole, targets = saved(name, tmp_path / "base")
    read = []
    real = core_model_loading._materialize_copy
    monkeypatch.setattr(core_model_loading, "_materialize_copy", lambda t, *a, **k: read.append(1) or real(t, *a, **k))
    upper = load_upper(type(whole), str(tmp_path / "base"), CUT)
    blocks = layer_map(whole).names
    lower = tuple(f"{block}." for block in blocks[:CUT])
    expected = {n: p for n, p in whole.named_parameters() if not n.startswith(lower)}
    there = dict(upper.named_parameters())
    assert there.keys() == expected.keys() and len(read) == len(expected)
    assert all(torch.equal(there[n], p) for n, p in expected.items())
    assert not any(t.is_meta for t in (*upper.parameters(), *upper.buffers()))
    assert layer_map(upper).names == blocks
    assert all(type(upper.get_submodule(block)) is StandIn for block in blocks[:CUT])
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    assert (upper.get_input_embeddings().weight is upper.get_output_embeddings().weight) == tied

    ids = torch.randint(0, 50, (2, 9))
    states = entering(whole, ids)
    fresh = copy.deepcopy(whole)
    fed(upper, states)
    trained(upper, targets, ids, tmp_path / "upper")
    trained(whole, targets, ids, tmp_path / "whole")
    logits = []
    for folder in ("upper", "whole"):
        adapted = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / folder).eval()
        with torch.no_grad():
            logits.append(adapted(input_ids=ids).logits)
    assert torch.equal(*logits)
    with torch.no_grad():
        assert not torch.allclose(logits[0], fresh.eval()(input_ids=ids).logits)


def test_what_cannot_be_is_said_before_weights_are_read(tmp_path):
    whole, _ = saved("llama", tmp_path)
    with pytest.raises(ConfigError, match="cut: 4 is not between 1 and 3"):
        load_upper(type(whole), str(tmp_path), 4)
    with pytest.raises(ConfigError, match="quantization_config"):
        load_upper(type(whole), str(tmp_path), 2, quantization_config={"load_in_4bit": True})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is quantized already"):
        load_upper(type(whole), str(tmp_path), 2)
