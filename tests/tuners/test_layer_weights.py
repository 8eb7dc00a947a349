"""A weight for each layer: of what an adapter has trained, and of what sets two models apart."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerpeft
from layerpeft import LayerFullConfig, LayerLoraConfig
from layerpeft.cli import main
from layerpeft.errors import ConfigError, LayerpeftError, SaveError
from layerpeft.integrations.files import fingerprint
from layerpeft.saving.shards import Entry, write_one_by_one
from layerpeft.tuners.difference import RECORD, add_difference
from layerpeft.tuners.layer_weights import LayerWeights
from layerpeft.tuners.merge import merge
from tests.helpers.loops import llama, make_batches
from tests.tuners.test_merge import assert_same, content, merged_both_ways, wrapped

WEIGHTS = {2: 0.5, 3: 0.0, "outside": -0.25}


def weight_of(name):
    layer = next((i for i in range(4) if f".layers.{i}." in name), "outside")
    return {0: 1.0, 1: 1.0, **WEIGHTS}[layer]


KINDS = {
    "lora": LayerLoraConfig(select="last:3", r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
    "full": LayerFullConfig(select="last:3", modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("lora", torch.bfloat16),
        ("full", torch.float32),
        pytest.param("lora", torch.float32, marks=pytest.mark.slow),
        pytest.param("full", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_was_trained_counts_by_the_weight_of_its_layer(kind, dtype, tmp_path, monkeypatch):
    base = tmp_path / "base"
    start: Any = llama(tie_word_embeddings=False)
    start.to(dtype).save_pretrained(base, max_shard_size="20KB")
    config = KINDS[kind].changed(task_type="CAUSAL_LM")
    model = wrapped(base, config)
    model.save_pretrained(tmp_path / "adapter")
    plain = content(merge(tmp_path / "adapter", tmp_path / "plain"))
    pieces, whole = merged_both_ways(tmp_path / "adapter", tmp_path, monkeypatch, weights=WEIGHTS)
    assert_same(pieces, whole)
    old, new = content(base), content(pieces)
    assert old.keys() == new.keys()
    deltas = {}
    if kind == "lora":
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                delta = layer.double().get_delta_weight("default").detach()
                deltas[f"{name.removeprefix('base_model.model.')}.weight"] = delta
    for name, tensor in new.items():
        weight, was = weight_of(name), old[name]
        if weight == 1:
            assert torch.equal(tensor, plain[name]), name  # PEFT's own, to the bit
        elif weight == 0 or torch.equal(plain[name], was):
            assert torch.equal(tensor, was), name
        else:
            delta = deltas[name] if name in deltas else plain[name].double() - was.double()
            assert torch.equal(tensor, (was.double() + weight * delta).to(was.dtype)), name
            assert not torch.equal(tensor, was)
    assert {n.split(".")[2] for n in new if ".layers." in n and not torch.equal(new[n], old[n])} == {"1", "2"}


def test_weights_are_read_from_words_and_files_and_refused_by_name(tmp_path, capsys):
    (tmp_path / "weights.yaml").write_text("0-1: 0.5\nlast:1: 2\noutside: 0\n")
    (tmp_path / "weights.json").write_text('{"0-1": 0.5, "last:1": 2, "outside": 0}')
    names = [f"model.layers.{i}" for i in range(4)]
    for asked in ("layers.0-1=0.5, last:1=2,outside=0", "0,1=0.5,3=2,outside=0", tmp_path / "weights.yaml",
                  str(tmp_path / "weights.json"), {"0-1": 0.5, -1: 2, "outside": 0}):  # fmt: skip
        found = LayerWeights.parse(asked).placed(names)
        assert [found(f"{n}.mlp.up_proj") for n in names] == [0.5, 0.5, 1, 2] and found("lm_head.weight") == 0
    (tmp_path / "broken.yaml").write_text("0-1: [")
    for asked, says in (
        ("0-1", "cannot read '0-1', which is no file either"),
        ("0=1=2", "cannot read"),
        ("0=", "'' is no finite number"),
        ("0=nan,x:2=1", r"(?s)'nan' is no finite number.*cannot read 'x:2'"),
        (tmp_path / "broken.yaml", "neither YAML nor JSON"),
        ("0-1=1,1=2", "layer 1 has a weight already"),
        ("0-9=1", "out of range; layers are 0 to 3"),
    ):
        with pytest.raises(ConfigError, match=says):
            LayerWeights.parse(asked).placed(names)


# ---- what sets two models apart -------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """A base, it trained further, and it tuned for instructions, in two types of number."""
    torch.manual_seed(3)
    folders = {}
    for name, dtype in (("base", torch.float32), ("trained", torch.bfloat16), ("instruct", torch.bfloat16)):
        model: Any = llama().requires_grad_(False)
        if name != "base":
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        folders[name] = tmp_path / name
        model.to(dtype).save_pretrained(folders[name], max_shard_size="20KB")
    (folders["instruct"] / "chat_template.jinja").write_text("{{ messages }}")
    return folders


def test_the_difference_of_two_models_is_added_by_the_weight_of_each_layer(three, tmp_path):
    out = tmp_path / "out"
    words = ["merge", str(three["trained"]), str(out), "--plus", str(three["instruct"]), "--minus", str(three["base"])]
    assert main([*words, "--weights", "2=0.5,3=0,outside=-0.25"]) == 0
    trained, plus, minus, new = (content(f) for f in (three["trained"], three["instruct"], three["base"], out))
    assert new.keys() == trained.keys() and len(list(out.glob("*.safetensors"))) > 2
    for name, tensor in new.items():
        want = trained[name].double() + weight_of(name) * (plus[name].double() - minus[name].double())
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, want.to(torch.bfloat16)), name
    both: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    loaded, problems = both
    assert not any(problems[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, new[n]) for n, p in loaded.named_parameters())
    assert torch.isfinite(loaded(**make_batches()[0]).logits).all() and (out / "chat_template.jinja").is_file()
    said = json.loads((out / RECORD).read_text())
    assert said["weights"] == {f"model.layers.{i}": weight_of(f".layers.{i}.") for i in range(4)} | {"outside": -0.25}
    for role, name in (("trained", "trained"), ("plus", "instruct"), ("minus", "base")):
        assert said[role]["files"] == {f.name: fingerprint(f) for f in three[name].glob("*.safetensors")}


def test_models_that_do_not_fit_are_refused_at_once_and_nothing_is_lost(three, tmp_path, monkeypatch, capsys):
    def kept():
        return {p: fingerprint(p) for p in tmp_path.rglob("*") if p.is_file()}

    def refused(says, *changed, **more):
        before = kept()
        names = [three["trained"], tmp_path / "out", three["instruct"], three["base"]]
        for place, other in changed:
            names[place] = other
        with pytest.raises(LayerpeftError, match=says):
            add_difference(*names, **more)
        assert kept() == before and not [p for p in tmp_path.iterdir() if "partial" in p.name]

    llama(vocab_size=72, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    refused(r"(?s)plus: .* lacks 9 tensors.*plus: 2 shapes differ .*embed_tokens.weight \[72, 32\], not \[64, 32\]",
            (2, tmp_path / "other"))  # fmt: skip
    refused("no folder, nor a model", (3, tmp_path / "nowhere"))
    refused("out of range; layers are 0 to 3", weights="0-9=1")
    model = layerpeft.get_peft_model(llama(), LayerLoraConfig(select="last:1", r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    refused("holds an adapter: merge it first", (0, tmp_path / "adapter"))
    refused("is not empty", (1, three["base"]))
    for name, tokens in (("trained", ["a", "b"]), ("instruct", ["a", "c"]), ("base", ["a", "b"])):
        words = {token: number for number, token in enumerate(tokens)}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "a"}
        plain = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        said = {"version": "1.0", "added_tokens": [], **plain, "model": model}
        (three[name] / "tokenizer.json").write_text(json.dumps(said))
        (three[name] / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused("another vocabulary than .*: 1 is 'b' here and 'c' there")
    shutil.copyfile(three["base"] / "tokenizer.json", three["instruct"] / "tokenizer.json")

    def stopped(*_):
        raise KeyboardInterrupt

    before = kept()
    with monkeypatch.context() as patched:  # in the middle of the second file
        patched.setattr("layerpeft.tuners.difference._copy", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_difference(three["trained"], tmp_path / "out", three["instruct"], three["base"])
    assert kept() == before and not (tmp_path / "out").exists()
    assert main(["merge", str(three["trained"]), str(tmp_path / "out"), "--plus", "x"]) == 2
    assert "go together" in capsys.readouterr().err
    last = sorted(three["base"].glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    refused(f"{last.name} is truncated")


def test_a_file_written_in_pieces_is_whole_or_refused(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor(2), "c": torch.randn(4).to(torch.bfloat16)}
    entries = {n: Entry("x", tuple(t.shape), t.dtype) for n, t in tensors.items()}
    write_one_by_one(tmp_path / "x.safetensors", entries, lambda n: tensors[n].reshape(-1).split(4))
    found = content(tmp_path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in found)
    with pytest.raises(SaveError, match="a takes 60 bytes, and 16 were given"):
        write_one_by_one(tmp_path / "y.safetensors", entries, lambda n: [tensors[n].reshape(-1)[:4]])


def peak():
    """The most that this process has held since it was last asked, in kB."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts pages as Linux does")
def test_no_more_than_a_tensor_of_each_model_is_in_memory(tmp_path):
    """Of models of 150 MB, whose largest tensor takes 8 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 5, "vocab_size": 4096}
    model = llama(**sizes, num_attention_heads=8, num_key_value_heads=8)
    model.save_pretrained(tmp_path / "base")
    for name in ("trained", "instruct"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
    del model
    add_difference(
        tmp_path / "trained", tmp_path / "once", tmp_path / "instruct", tmp_path / "base"
    )  # imports and caches
    peak()
    before = peak()
    add_difference(tmp_path / "trained", tmp_path / "out", tmp_path / "instruct", tmp_path / "base", {"0-3": 0.5})
    assert (
        tmp_path / "out" / "model.safetensors"
    ).stat().st_size > 140_000_000 and peak() - before < 3 * 8_400 + 100_000
