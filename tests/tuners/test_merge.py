"""An adapter merged into its base, as a full model that plain transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig
from layerpeft.cli import main
from layerpeft.errors import SaveError
from layerpeft.model.precisions import Storage, missing_packages, precision_of, quantized_linear
from layerpeft.quantization.save import load_saved, save_model
from layerpeft.tuners.merge import merge
from layerpeft.tuners.merge_files import NotPiecewise
from tests.helpers.loops import adamw, llama, make_batches, step
from tests.helpers.models import MODELS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["lora", "galore"])
def trained(request, base, tmp_path_factory):
    options = {"select": "last:2", "r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    kinds = {"lora": LayerLoraConfig, "galore": LayerGaloreConfig}
    more = {"update_proj_gap": 2} if request.param == "galore" else {}
    model = layerpeft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), kinds[request.param](**options, **more)
    )
    optimizer, batches = adamw(model), make_batches()
    for batch in batches[:6]:
        step(model, optimizer, batch)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        return folder, model.eval()(**batches[0]).logits


def test_the_merged_model_is_the_trained_one(trained, tmp_path):
    folder, logits = trained
    out = merge(folder, tmp_path / "merged")
    assert (out / "tokenizer.json").is_file() and not (out / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.allclose(plain(**make_batches()[0]).logits, logits, atol=1e-5)
    assert "peft" not in json.dumps(plain.config.to_dict())


def test_a_folder_that_holds_something_is_left_alone(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="is not empty"):
        merge(trained[0], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_adapter_is_refused_before_anything_is_written(trained, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in trained[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SaveError):
        merge(broken, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_command_merges_over_a_base_that_has_moved(trained, base, tmp_path, capsys):
    folder, logits = trained
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    out = tmp_path / "merged"
    out.mkdir()  # empty
    assert main(["merge", str(folder), str(out), "--base", str(moved), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == f"{out}: a full model, which transformers loads by itself"
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.allclose(plain(**make_batches()[0]).logits.float(), logits, atol=0.1)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


def test_the_command_says_what_is_wrong(trained, tmp_path, capsys):
    for words, says in (
        ([str(trained[0]), str(tmp_path / "a"), "--dtype", "bfloat61"], "Did you mean 'bfloat16'"),
        (
            [str(trained[0]), str(tmp_path / "a"), "--base", str(tmp_path / "nowhere")],
            "is not there (looked for",
        ),
        ([str(tmp_path / "nothing"), str(tmp_path / "a")], "nothing"),
    ):
        assert main(["merge", *words]) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_quantized_base_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    config = LayerLoraConfig(select="last:2", r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    layerpeft.get_peft_model(packed, config).save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    with pytest.raises(SaveError, match="the base is quantized"):
        merge(tmp_path / "adapter", tmp_path / "merged", again)
    assert not (tmp_path / "merged").exists()


# ---- module by module -----------------------------------------------------------------------------------------------

COMMON = {"select": "last:2", "r": 4, "task_type": "CAUSAL_LM"}
WAYS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 32},
    "patterns": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.3.self_attn.q_proj": 64}},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "head": {"modules_to_save": ["lm_head", "norm"]},
}


def drawn(model):
    """Everything that trains, as if it had been."""
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.3 if "magnitude" not in name else 0.1
            parameter.data += scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    return model


def content(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118 - not a dict
    return found


def configs(folder):
    return {p.name: json.loads(p.read_text()) for p in folder.glob("*config.json")}


def merged_both_ways(adapter, tmp_path, monkeypatch, **options):
    """What the folders of both ways hold; the first one may not load the base."""

    def never(*_, **__):
        raise AssertionError("the base was loaded whole")

    def cannot(*_, **__):
        raise NotPiecewise("told so")

    with monkeypatch.context() as patched:
        patched.setattr("layerpeft.tuners.merge.load_verified", never)
        pieces = merge(adapter, tmp_path / "pieces", **options)
    with monkeypatch.context() as patched:
        patched.setattr("layerpeft.tuners.merge.plan_merge", cannot)
        whole = merge(adapter, tmp_path / "whole", **options)
    return pieces, whole


def assert_same(pieces, whole):
    a, b = content(pieces), content(whole)
    assert sorted(a) == sorted(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
    assert configs(pieces) == configs(whole)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bases(request, tmp_path_factory):
    """Bases of one type: a Llama with biases in several files, one with tied embeddings, and a GPT-2."""
    dtype, root = getattr(torch, request.param), tmp_path_factory.mktemp("bases")
    llama(attention_bias=True, mlp_bias=True).to(dtype).save_pretrained(root / "llama", max_shard_size="20KB")
    llama(tie_word_embeddings=True).to(dtype).save_pretrained(root / "tied")
    MODELS["gpt2"]().to(dtype).save_pretrained(root / "gpt2")
    return root


def wrapped(base, config, kind=AutoModelForCausalLM, **options):
    return drawn(layerpeft.get_peft_model(kind.from_pretrained(base, **options), config))


@pytest.mark.spread(4)
@pytest.mark.matrix
@pytest.mark.parametrize("way", list(WAYS))
def test_module_by_module_is_bit_for_bit_what_peft_merges(way, bases, tmp_path, monkeypatch):
    if way == "olora" and "bfloat16" in str(AutoModelForCausalLM.from_pretrained(bases / "llama").dtype):
        pytest.skip("PEFT cannot start OLoRA in this type")
    config = LayerLoraConfig(**COMMON, target_modules=["q_proj", "up_proj"], **WAYS[way])
    model = wrapped(bases / "llama", config)
    model.save_pretrained(tmp_path / "adapter")
    pieces, whole = merged_both_ways(tmp_path / "adapter", tmp_path, monkeypatch)
    assert_same(pieces, whole)
    names = {p.name for p in (bases / "llama").glob("model*")}
    assert len(names) > 2 and {p.name for p in pieces.glob("model*")} == names
    changed = {n for n, t in content(pieces).items() if not torch.equal(t, content(bases / "llama")[n])}
    assert changed and all(".layers.2." in n or ".layers.3." in n or way in ("head", "biases") for n in changed)
    plain = AutoModelForCausalLM.from_pretrained(pieces).eval()
    inputs = make_batches()[0]
    with torch.no_grad():
        close = torch.allclose(plain(**inputs).logits.float(), model.eval()(**inputs).logits.float(), atol=0.2)
    assert close


@pytest.mark.matrix
@pytest.mark.parametrize("base", ["tied", "gpt2"])
def test_other_bases_too(base, bases, tmp_path, monkeypatch):
    targets = {"tied": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[base]
    model = wrapped(bases / base, LayerLoraConfig(**COMMON, target_modules=targets, fan_in_fan_out=base == "gpt2"))
    model.save_pretrained(tmp_path / "adapter")
    assert_same(*merged_both_ways(tmp_path / "adapter", tmp_path, monkeypatch))


@pytest.mark.spread(2)
def test_an_adapter_in_16_bit_and_another_type_for_the_result(bases, tmp_path, monkeypatch):
    model = wrapped(bases / "llama", LayerLoraConfig(**COMMON, target_modules=["q_proj", "up_proj"]))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    options = {"base": shutil.copytree(bases / "llama", tmp_path / "moved"), "dtype": torch.float16}
    pieces, whole = merged_both_ways(tmp_path / "adapter", tmp_path, monkeypatch, **options)
    assert_same(pieces, whole)
    assert {t.dtype for t in content(pieces).values()} == {torch.float16}


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", ["galore", "full"])
def test_projected_and_whole_weights(kind, bases, tmp_path, monkeypatch):
    options = {"select": "last:2", "task_type": "CAUSAL_LM"}
    config = LayerFullConfig(**options)
    if kind == "galore":
        config = LayerGaloreConfig(**options, r=4, target_modules=["q_proj"], update_proj_gap=2)
    model = wrapped(bases / "llama", config)
    if kind == "galore":
        optimizer, batches = adamw(model), make_batches()
        for inputs in batches[:3]:
            step(model, optimizer, inputs)
    model.save_pretrained(tmp_path / "adapter")
    pieces, whole = merged_both_ways(tmp_path / "adapter", tmp_path, monkeypatch)
    assert_same(pieces, whole)
    assert any(not torch.equal(t, content(bases / "llama")[n]) for n, t in content(pieces).items())


def test_a_new_head_comes_from_the_adapter_and_the_base_keeps_its_number_of_classes(tmp_path, monkeypatch):
    MODELS["bert"]().bert.save_pretrained(tmp_path / "encoder")
    llama(pad_token_id=0).save_pretrained(tmp_path / "llama")
    config = LayerLoraConfig(select="last:2", r=4, task_type="SEQ_CLS", target_modules=["q_proj"])
    model = wrapped(tmp_path / "llama", config, AutoModelForSequenceClassification, num_labels=5)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "labels.json").write_text(json.dumps(list("abcde")))
    pieces, whole = merged_both_ways(tmp_path / "adapter", tmp_path, monkeypatch)
    assert_same(pieces, whole)
    assert content(pieces)["score.weight"].shape[0] == 5 and "lm_head.weight" not in content(pieces)


def test_what_cannot_be_done_in_pieces_is_done_in_memory_with_the_reason(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    MODELS["mixtral"]().save_pretrained(tmp_path / "mixtral")
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    llama().save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(llama().state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for base, more, why in (
        ("mixtral", {}, "transformers converts the tensors"),
        ("tied", {"modules_to_save": ["embed_tokens"]}, "is shared between modules"),
        ("bin", {}, "not in safetensors"),
    ):
        config = LayerLoraConfig(**COMMON, target_modules=["q_proj"], **more)
        model = wrapped(tmp_path / base, config).eval()
        model.save_pretrained(tmp_path / f"{base}_adapter")
        capfd.readouterr()
        out = merge(tmp_path / f"{base}_adapter", tmp_path / f"{base}_out")
        said = capfd.readouterr().err
        assert "merged in memory" in said and why in said
        plain, inputs = AutoModelForCausalLM.from_pretrained(out), make_batches()[0]
        with torch.no_grad():
            assert torch.allclose(plain(**inputs).logits, model(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens"]])
def test_what_is_merged_into_one_of_two_tied_modules_is_in_that_one_alone(targets, tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    for name, config in (
        ("ours", LayerLoraConfig(select="all", r=2, target_modules=targets, task_type="CAUSAL_LM")),
        ("stock", peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")),
    ):
        model = wrapped(tmp_path / "tied", config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2
        model.save_pretrained(tmp_path / name)
        inputs = make_batches()[0]
        with torch.no_grad():
            wanted = model(**inputs).logits
        plain = AutoModelForCausalLM.from_pretrained(merge(tmp_path / name, tmp_path / f"{name}-merged"))
        with torch.no_grad():
            assert torch.allclose(plain(**inputs).logits, wanted, atol=1e-4)
        assert plain.config.tie_word_embeddings is False
        other = plain.lm_head if "embed_tokens" in targets else plain.model.embed_tokens
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
        assert torch.equal(other.weight, base.model.embed_tokens.weight), "the other one did not move"


def test_a_base_that_is_not_where_the_adapter_says_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("my base")
    wrapped("my base", LayerLoraConfig(**COMMON, target_modules=["q_proj"])).save_pretrained("adapter")
    monkeypatch.chdir("adapter")
    assert main(["merge", ".", "merged"]) == 2
    said = capsys.readouterr().err
    assert "'my base' of . is not there (looked for" in said and "--base MODEL" in said and "Repo id" not in said
    with pytest.raises(SaveError, match=r"is not there .*pass the base model: load"):
        layerpeft.load(".")
    for command in (["merge", ".", "merged"], ["generate", ".", "--prompt", "x"], ["export", ".", "--to", "vllm"]):
        assert main([*command, "--base", "../adapter"]) == 2  # transformers would load what lies below it, too
        assert "it is an adapter, which lies on a model; name another one" in capsys.readouterr().err
    assert not Path("merged").exists()
    assert main(["merge", ".", "merged", "--base", "../my base"]) == 0


def test_the_tokenizer_is_the_adapters_or_else_the_bases(bases, tmp_path):
    base = shutil.copytree(bases / "llama", tmp_path / "base")
    (base / "tokenizer.json").write_text('{"of": "base"}')
    (base / "merges.txt").write_text("base")
    wrapped(base, LayerLoraConfig(**COMMON, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    out = merge(tmp_path / "adapter", tmp_path / "one")
    assert (out / "tokenizer.json").read_text() == '{"of": "base"}' and (out / "merges.txt").is_file()
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    out = merge(tmp_path / "adapter", tmp_path / "two")
    assert (out / "tokenizer.json").read_text() == "{}" and not (out / "merges.txt").exists()


def test_a_base_that_is_cut_short_is_refused(bases, tmp_path):
    base = shutil.copytree(bases / "llama", tmp_path / "base")
    wrapped(base, LayerLoraConfig(**COMMON, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    last = sorted(base.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    with pytest.raises(SaveError, match=rf"{last.name} is truncated"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    last.unlink()
    with pytest.raises(SaveError, match=rf"{last.name} cannot be read"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not [p for p in tmp_path.iterdir() if "merged" in p.name]


# ---- quantized bases ------------------------------------------------------------------------------------------------

QUANT = pytest.mark.skipif(bool(missing_packages(["nf4", "hqq4"])), reason="without bitsandbytes and hqq")


@pytest.mark.spread(2)
@QUANT
@pytest.mark.parametrize("kinds", [("nf4", "int8", "hqq4", "16bit"), ("nf4", "nf4", "nf4", "16bit"), ("int8",) * 4])
def test_a_quantized_base_takes_an_adapter_when_asked_and_says_what_it_lost(kinds, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    model = llama(hidden_size=64, intermediate_size=128, attention_bias=True).eval()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    for name, kind in zip(names, kinds, strict=True):
        model.set_submodule(name, quantized_linear(model.get_submodule(name), kind, Storage()))
    save_model(model, tmp_path / "base")
    config = LayerLoraConfig(select="last:4", r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained = drawn(layerpeft.get_peft_model(load_saved(tmp_path / "base"), config)).eval()
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SaveError, match=r"the base is quantized .*into_quantized=True"):
        merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    capfd.readouterr()
    words = ["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main([*words, "--into-quantized"]) == 0
    said = capfd.readouterr()
    packed = len([k for k in kinds if k != "16bit"])
    assert f"merged into {packed} quantized linears" in said.err and "% of the change" in said.err
    plain = len(set(kinds) - {"16bit"}) == 1
    assert ("which transformers loads by itself" if plain else "layerpeft.load loads") in said.out
    merged = load_saved(tmp_path / "out")
    assert tuple(precision_of(merged.get_submodule(n)) for n in names) == kinds
    assert all(torch.equal(merged.get_submodule(n).bias, model.get_submodule(n).bias) for n in names)
    inputs = make_batches()[0]
    with torch.no_grad():
        before, wanted, got = (m(**inputs).logits for m in (load_saved(tmp_path / "base"), trained, merged))
    assert (got - wanted).norm() < 0.5 * (before - wanted).norm()


@QUANT
def test_a_base_in_16_bit_is_not_asked_for_as_quantized(base, trained, tmp_path):
    with pytest.raises(SaveError, match="leave out into_quantized"):
        merge(trained[0], tmp_path / "out", into_quantized=True)
    assert not (tmp_path / "out").exists()


@QUANT
def test_an_adapter_from_over_a_rounded_base_goes_into_the_unrounded_one(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LayerLoraConfig(**COMMON, target_modules=["q_proj"], quantize_frozen="nf4", quantize_trained="nf4")
    drawn(layerpeft.get_peft_model(model, config)).save_pretrained(tmp_path / "adapter")
    capfd.readouterr()
    out = merge(tmp_path / "adapter", tmp_path / "out")
    assert "trained over a base that was rounded" in capfd.readouterr().err
    a, b = content(out), content(tmp_path / "base")
    assert sorted(a) == sorted(b) and {t.dtype for t in a.values()} == {torch.float32}
    changed = {n for n in a if not torch.equal(a[n], b[n])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (2, 3)}
