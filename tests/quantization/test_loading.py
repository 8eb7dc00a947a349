"""A checkpoint that is quantized while it is read: the same model as one that was loaded first, without its peak."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks import resident
from benchmarks.kinds import loading
from layerpeft.errors import ConfigError
from layerpeft.integrations.peft import dequantized
from layerpeft.model.layers import layer_map
from layerpeft.model.new_modules import LOADED_MARK, new_modules
from layerpeft.model.precisions import (
    Storage,
    measured_bytes,
    missing_packages,
    precision_of,
    quantized_linear,
    stored_bytes,
)
from layerpeft.quantization.load import frugally_quantized, load_quantized
from tests.helpers.loops import llama, make_batches
from tests.helpers.models import MODELS, batch
from tests.helpers.processes import ROOT, in_a_process

PACKAGES = missing_packages(["nf4", "hqq2"])
pytestmark = pytest.mark.skipif(bool(PACKAGES), reason=f"without {', '.join(PACKAGES)}")

CYCLE = ("nf4", "hqq4", "int8", "16bit", "fp4", "hqq2")
STORAGE = Storage(group_size=16)
CLASSES = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForSequenceClassification"}


def assigned(model):
    """Every other way of storing, linear by linear, in the blocks of all stacks."""
    stacks = layer_map(model).stacks
    names = [t.name for s in stacks for t in layer_map(model, s.rpartition("=")[2]).targets if t.kind == "linear"]
    # T5's feed-forward asks for the type of a `weight`, which HQQ's linears do not have
    cycle = [p for p in CYCLE if model.config.model_type != "t5" or not p.startswith("hqq")]
    return {name: cycle[i % len(cycle)] for i, name in enumerate(names)}


def in_place(model, assignment):
    for name, precision in assignment.items():
        model.set_submodule(name, quantized_linear(model.get_submodule(name), precision, STORAGE))
    return model


def tensors(model):
    """All that a model holds, packed weights and their scales included."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, module in model.named_modules():
        if precision_of(module).startswith("hqq"):
            extra = {k: v for k, v in module.meta.items() if isinstance(v, torch.Tensor)}
            found |= {f"{name}.{k}": v for k, v in extra.items()}
            if module.bias is not None:
                found[f"{name}.bias"] = module.bias
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is not None:
            found[f"{name}.SCB"] = scales
    return found


def assert_equal(one, other):
    a, b = tensors(one), tensors(other)
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.device.type == "cpu", name
        assert torch.equal(value, b[name]), name
    groups = [[sorted(n for n, v in t.items() if v is w) for w in t.values()] for t in (a, b)]
    assert groups[0] == groups[1]  # what is tied is tied in both


def pair(folder, kind="AutoModelForCausalLM", dtype=None, **options):
    torch.manual_seed(3)
    plain = getattr(transformers, kind).from_pretrained(folder, dtype=dtype or "auto", **options)
    assignment = assigned(plain)
    torch.manual_seed(3)
    loaded = load_quantized(folder, assignment, STORAGE, kind=kind, dtype=dtype, progress=False, **options)
    return in_place(plain, assignment), loaded, assignment


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "t5", "opt", "gemma2", "mixtral", "qwen3_next", "phi3"])
def test_it_is_the_model_that_is_loaded_and_then_quantized(name, dtype, tmp_path):
    source = MODELS[name]().to(torch.bfloat16)
    source.save_pretrained(tmp_path, max_shard_size="20KB" if name == "llama" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (name == "llama")
    plain, loaded, assignment = pair(tmp_path, CLASSES.get(name, "AutoModelForCausalLM"), dtype)
    assert_equal(plain, loaded)
    for module, precision in assignment.items():
        assert precision_of(loaded.get_submodule(module)) == precision
    assert not loaded.training and type(loaded) is type(plain)
    assert loaded.config.to_dict() == plain.config.to_dict() and loaded.name_or_path == plain.name_or_path
    assert loaded.generation_config.to_dict() == plain.generation_config.to_dict()
    kept = [n for n, v in vars(loaded).items() if "quant" in n or n.startswith("hf_")]
    assert not kept
    inputs = batch(name, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, plain(**inputs).logits)


def test_a_head_that_the_checkpoint_lacks_is_drawn_as_always_and_counts_as_new(tmp_path):
    MODELS["bert"]().bert.save_pretrained(tmp_path)  # the encoder alone: names without the prefix of the classifier
    plain, loaded, assignment = pair(tmp_path, CLASSES["bert"], num_labels=5)
    assert_equal(plain, loaded)
    assert loaded.classifier.out_features == 5 and "bert.encoder.layer.0.attention.self.query" in assignment
    marks = {n for n, p in loaded.named_parameters() if getattr(p, LOADED_MARK, False)}
    assert marks == {n for n, _ in loaded.named_parameters() if not n.startswith("classifier")}
    assert new_modules(loaded) == ("classifier",)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    plain, loaded, _ = pair(tmp_path)
    assert_equal(plain, loaded)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_an_old_checkpoint_of_single_experts_and_pickled_weights_are_converted_on_the_way(tmp_path):
    model = MODELS["mixtral"]()
    model.save_pretrained(tmp_path / "old")
    assert any("experts.0.w1" in n for n in names_in(tmp_path / "old"))  # one tensor an expert; three fused ones here
    assert_equal(*pair(tmp_path / "old")[:2])
    model.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(llama().state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    llama().config.save_pretrained(tmp_path / "bin")
    assert_equal(*pair(tmp_path / "bin")[:2])


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_a_checkpoint_with_a_hole_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    state = {n: t.clone() for n, t in llama().state_dict().items() if "layers.2.mlp.up_proj" not in n}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for assignment in ({}, {"model.layers.2.mlp.up_proj": "nf4"}):
        with pytest.raises(ConfigError, match=r"lacks 1 tensors of the layers \(model.layers.2.mlp.up_proj.weight\)"):
            load_quantized(tmp_path, assignment, STORAGE, progress=False)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="3 problems") as error:
        load_quantized(tmp_path, {"lm_head": "nf5"}, STORAGE, kind="AutoModelForCausalLMs", device_map="auto")
    for part in ("'nf4'", "'AutoModelForCausalLM'", "device=…"):
        assert part in str(error.value)
    asked = {"model.layers.0.mlp.up_prj": "nf4", "model.embed_tokens": "int8", "lm_head": "hqq2"}
    with pytest.raises(ConfigError, match="3 problems") as error:
        load_quantized(tmp_path, asked, Storage(group_size=1000), progress=False)
    for part in ("did you mean 'model.layers.0.mlp.up_proj'", "of the class Embedding", "64 x 32 do not fill"):
        assert part in str(error.value)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    llama(hidden_size=64).save_pretrained(tmp_path)
    asked = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked).save_pretrained(tmp_path / "4bit")
    with pytest.raises(ConfigError, match="quantized already .*bitsandbytes"):
        load_quantized(tmp_path / "4bit", {"model.layers.0.mlp.up_proj": "nf4"}, STORAGE)


def test_peft_wraps_every_kind_of_linear_and_trains_it(tmp_path):
    llama(hidden_size=64).save_pretrained(tmp_path)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    loaded = load_quantized(tmp_path, dict(zip(names, ("nf4", "int8", "hqq2", "16bit"), strict=True)), STORAGE)
    model = get_peft_model(loaded, LoraConfig(target_modules=names, r=2))
    batch = make_batches()[0]
    model.train()(**batch).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 4 and all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.matrix("precision,double_quant")
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "hqq2"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_that_is_quantized_some_rows_at_a_time_is_the_same(precision, double_quant, dtype, monkeypatch):
    monkeypatch.setattr("layerpeft.integrations.bitsandbytes.SLAB", 96 * 64)
    linear = nn.Linear(96, 200).to(dtype).requires_grad_(False)
    storage = Storage(double_quant=double_quant)
    whole, joined = quantized_linear(linear, precision, storage), frugally_quantized(linear, precision, storage)
    a, b = tensors(whole), tensors(joined)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
    assert precision_of(joined) == precision and joined.out_features == 200
    assert measured_bytes(joined) == measured_bytes(whole) == stored_bytes(precision, 200, 96, storage, dtype.itemsize)
    x = torch.randn(3, 96, dtype=dtype)
    for mode in (True, False):
        assert torch.equal(whole.train(mode)(x), joined.train(mode)(x))
    assert torch.equal(dequantized(whole), dequantized(joined))
    assert str(whole) == str(joined)


MEMORY = pytest.mark.skipif(not resident.here(), reason="the system does not tell how much memory a process has")


@MEMORY
def test_the_peak_is_the_result_and_less_than_two_layers(tmp_path):
    """100 MB, in a process of its own; loaded in another type than the file's, so that what is read is copied."""
    options = loading.Options(1024, 2816, layers=4, vocab_size=256, shard="30MB")
    size, layer = loading.write(options, tmp_path / "base")
    assert size > 100_000_000
    words = ("load_quantized", tmp_path / "base", "nf4", "float16", 1)
    done = in_a_process(loading.__file__, *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["peak"] < row["packed"] + row["kept"] + 2 * layer
    assert row["after"] < row["packed"] + row["kept"] + layer / 2  # and nothing stays of it
    assert row["packed"] < 0.3 * size
