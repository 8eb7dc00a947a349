"""A quantized model on disk: the same logits again, through plain transformers where its format can hold the model."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from layerpeft.errors import SaveError
from layerpeft.model import precisions
from layerpeft.model.precisions import Storage, missing_packages, precision_of
from layerpeft.quantization.save import MANIFEST, is_saved, load_saved, save_model
from tests.helpers.loops import llama, make_batches
from tests.helpers.models import MODELS, batch
from tests.helpers.processes import without_the_package
from tests.quantization.test_loading import assert_equal, assigned, tensors

PACKAGES = missing_packages(["nf4", "hqq2"])
pytestmark = pytest.mark.skipif(bool(PACKAGES), reason=f"without {', '.join(PACKAGES)}")


def stored(model, assignment, **storage):
    settings = Storage(**{"group_size": 16, **storage})
    for name, precision in assignment.items():
        made = precisions.quantized_linear(model.get_submodule(name), precision, settings)
        model.set_submodule(name, made)
    return model.eval()


def cast(model, dtype):
    """As loading in a type does it: buffers that a model computes by itself stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


ALONE = """
    import sys
    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "layerpeft":
                raise ImportError("layerpeft is not to be had here")
    sys.meta_path.insert(0, Nothing())
    import torch
    from transformers import AutoModelForCausalLM
    found, inputs = [], torch.load("inputs.pt")
    for folder in sys.argv[1:]:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder)
        except OSError as error:
            found.append(str(error))
            continue
        for module in model.modules():  # the AVX512 kernels of some CPUs round otherwise
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            found.append(model(**inputs).logits)
    torch.save(found, "found.pt")
    assert "layerpeft" not in sys.modules
"""
KINDS = {"nf4": ("bfloat16", True), "fp4": ("float32", False), "int8": ("bfloat16", False)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of one kind each and of a mixture, their models, and what a process without layerpeft makes of the folders."""
    root, models = tmp_path_factory.mktemp("alone"), {}
    for kind, (dtype, double) in KINDS.items():
        sizes = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
        model = cast(llama(**sizes, tie_word_embeddings=kind == "nf4"), getattr(torch, dtype))
        assignment = {n: kind for n in assigned(model) if ".layers.1." not in n and ".layers.3." not in n}
        models[kind] = stored(model, assignment, double_quant=double)
    models["mixture"] = stored(llama(), {"model.layers.0.mlp.up_proj": "hqq2", "lm_head": "nf4"})
    for name, model in models.items():
        save_model(model, root / name, max_shard_size="60KB")
    torch.save(make_batches()[0], root / "inputs.pt")
    done = without_the_package(textwrap.dedent(ALONE), *models, cwd=root)
    assert done.returncode == 0, done.stderr
    return root, models, dict(zip(models, torch.load(root / "found.pt"), strict=True)), done.stderr


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_kind_beside_kept_layers_loads_with_transformers_alone(kind, alone):
    root, models, found, _ = alone
    config = json.loads((root / kind / "config.json").read_text())["quantization_config"]
    kept = {n for n, m in models[kind].named_modules() if type(m) is torch.nn.Linear}
    assert set(config["llm_int8_skip_modules"]) == kept and {"lm_head", "model.layers.1.mlp.up_proj"} <= kept
    assert (root / kind / "model.safetensors.index.json").is_file()
    inputs = make_batches()[0]
    expected = logits(models[kind], inputs)
    assert torch.equal(found[kind], expected)
    assert torch.equal(logits(load_saved(root / kind), inputs), expected)


def test_plain_transformers_stops_at_a_mixture(alone):
    root, _, found, said = alone
    assert "no file named model.safetensors" in found["mixture"] and "got layerpeft" in said
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(root / "mixture")  # with layerpeft imported, too


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", ["llama", "qwen2", "t5", "opt", "bert", "mixtral", "gemma3_vlm"])
def test_any_mixture_loads_with_layerpeft_tensor_for_tensor(name, tmp_path):
    source = cast(MODELS[name](), torch.bfloat16)
    source.save_pretrained(tmp_path / "plain")
    model = type(source).from_pretrained(tmp_path / "plain")
    stored(model, assigned(model), double_quant=name == "llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)  # what was trained is saved as it is
    save_model(model, tmp_path / "saved", max_shard_size="50KB" if name == "llama" else "5GB")
    again = load_saved(tmp_path / "saved", progress=False)
    assert type(again) is type(model) and again.dtype == torch.bfloat16
    assert not hasattr(again, "hf_quantizer") and not hasattr(again.config, "quantization_config")
    a, b = tensors(model), tensors(again)
    assert sorted(a) == sorted(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
    inputs = batch(name, model)
    if name == "gemma3_vlm":
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_what_transformers_could_not_hold_is_kept_by_layerpeft(tmp_path):
    """Numbers of two types, and a name of a kept linear in which a pattern would find another one."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(4)]
    mixed = stored(cast(llama(hidden_size=64), torch.bfloat16), dict.fromkeys(names, "nf4"))
    mixed.model.norm.to(torch.float32)
    save_model(mixed, tmp_path / "types")
    assert not json.loads((tmp_path / "types" / MANIFEST).read_text())["plain_transformers"]
    again = load_saved(tmp_path / "types")
    assert again.model.norm.weight.dtype == torch.float32 and again.lm_head.weight.dtype == torch.bfloat16
    t5 = cast(MODELS["t5"](), torch.float16)  # T5 keeps its `wo` in 32 bit then
    wo = next(n for n, _ in t5.named_modules() if n.endswith(".wo"))
    save_model(stored(t5, {wo: "nf4"}), tmp_path / "t5")
    assert precision_of(load_saved(tmp_path / "t5").get_submodule(wo)) == "nf4"


def test_a_loaded_model_takes_an_adapter_and_trains(tmp_path):
    model = llama(hidden_size=64)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    save_model(stored(model, dict(zip(names, ("nf4", "int8", "hqq2", "16bit"), strict=True))), tmp_path / "saved")
    peft_model = get_peft_model(load_saved(tmp_path / "saved"), LoraConfig(target_modules=names, r=2))
    peft_model.train()(**make_batches()[0]).loss.backward()
    gradients = [p.grad for n, p in peft_model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 4 and all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_a_saved_model_can_be_saved_again_after_it_ran(tmp_path):
    names = {f"model.layers.{i}.self_attn.q_proj": p for i, p in enumerate(("nf4", "int8"))}
    for kinds in (names, {n: "int8" for n in names}):
        model = stored(llama(hidden_size=64), kinds)
        first = tmp_path / f"first{len(set(kinds.values()))}"
        save_model(model, first)
        again = load_saved(first)
        inputs = make_batches()[0]
        expected = logits(again, inputs)  # int8's scales have moved now
        second = first.with_name(f"{first.name}.second")
        save_model(again, second)
        assert torch.equal(logits(load_saved(second), inputs), expected)
        assert_equal(load_saved(second), load_saved(first))
        assert hasattr(again, "hf_quantizer") == (len(set(kinds.values())) == 1)


def test_what_is_not_to_be_saved_is_refused_with_all_reasons(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="2 problems") as error:
        save_model(llama(), tmp_path)
    assert "not empty" in str(error.value) and "no quantized linears" in str(error.value)
    model = stored(llama(hidden_size=64), {"lm_head": "nf4"})
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for given in (wrapped, wrapped.get_base_model()):
        with pytest.raises(SaveError, match="has adapters"):
            save_model(given, tmp_path / "new")
    save_model(wrapped.unload(), tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "notes.txt"] and is_saved(tmp_path / "new")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    model = stored(llama(hidden_size=64), {"lm_head": "nf4"})
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir()) and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name", ["config.json", "layerpeft_model.safetensors"])
def test_every_damage_is_found(name, tmp_path):
    folder = save_model(
        stored(llama(hidden_size=64), {"lm_head": "nf4", "model.layers.0.mlp.up_proj": "int8"}), tmp_path / "a"
    )
    file = folder / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(SaveError, match=rf"{name} is .* bytes of"):
        load_saved(folder, verify=False)
    file.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(SaveError, match=rf"{name} was altered"):
        load_saved(folder)
    file.unlink()
    with pytest.raises(SaveError, match=f"{name} is missing"):
        load_saved(folder)
    file.write_bytes(whole)
    load_saved(folder)
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"nf4"', '"fp4"'))
    with pytest.raises(SaveError, match="altered after it was written"):
        load_saved(folder)
    manifest.unlink()
    with pytest.raises(SaveError, match=f"has no {MANIFEST}"):
        load_saved(folder)


def test_weights_that_a_kernel_has_repacked_are_not_written(tmp_path):
    model = stored(llama(hidden_size=64), {"lm_head": "nf4", "model.layers.0.mlp.up_proj": "int8"})
    model.lm_head.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(SaveError, match="repacked"):
        save_model(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
