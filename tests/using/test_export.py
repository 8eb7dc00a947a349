"""What was trained, for vLLM and as a whole model: what is refused, what is written, what is printed."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from layerpeft import (
    LayerFullConfig,
    LayerGaloreConfig,
    LayerHeadConfig,
    LayerLoraConfig,
    LayerUnlockConfig,
    get_peft_model,
)
from layerpeft.cli import main
from layerpeft.errors import ExportError
from layerpeft.model.precisions import Storage, missing_packages, quantized_linear
from layerpeft.quantization.save import save_model
from layerpeft.tuners.load import adapter_config
from layerpeft.using.export import vllm
from layerpeft.using.export.adapter import read_adapter
from layerpeft.using.export.export import export
from layerpeft.using.export.limits import VLLM
from layerpeft.using.export.subject import Subject
from layerpeft.using.folder import find
from tests.helpers.loops import adamw, llama, make_batches, step
from tests.helpers.models import MODELS
from tests.helpers.repeating import some
from tests.helpers.serving import check, serving

LAST = "model.layers.3.self_attn"
COMMON: dict[str, Any] = {"select": "last:2", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file, one in several, and one whose head is its embeddings."""
    root = tmp_path_factory.mktemp("bases")
    llama().save_pretrained(root / "one")
    llama(attention_bias=True).save_pretrained(root / "sharded", max_shard_size="20KB")
    llama(tie_word_embeddings=True).save_pretrained(root / "tied")
    return root


def drawn(model: Any) -> Any:
    """All that trains, as if it had been."""
    draw = torch.Generator().manual_seed(5)
    for _, tensor in model.named_parameters():
        if tensor.requires_grad:
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=draw)
    return model


def trained(base: Path, config: Any, folder: Path) -> torch.Tensor:
    """Saves an adapter; what it says."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if isinstance(config, LayerGaloreConfig):
        optimizer = adamw(model)
        for batch in make_batches()[:5]:
            step(model, optimizer, batch)
    else:
        drawn(model)
    model.save_pretrained(str(folder))
    return said_by(model)


def said_by(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=make_batches()[0]["input_ids"]).logits


def weight_of(factors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]


UNEVEN = {
    "alone": {"r": 4, "target_modules": ["q_proj"]},
    "ranks": {
        "r": 4,
        "rank_pattern": {"up_proj": 2, "layers.3.self_attn.q_proj": 8},
        "target_modules": ["q_proj", "up_proj"],
    },
    "alphas": {
        "r": 4,
        "use_rslora": True,
        "alpha_pattern": {"down_proj": 3},
        "target_modules": ["v_proj", "down_proj"],
    },
}


@pytest.mark.parametrize("name", some(UNEVEN, ("ranks", "alphas")))
def test_an_adapter_for_vllm_is_the_same_in_plain_peft_with_one_scale_for_all(name, bases, tmp_path, capsys):
    wanted = trained(bases / "one", LayerLoraConfig(**COMMON, lora_alpha=8, **UNEVEN[name]), tmp_path / "a run")
    (tmp_path / "a run" / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "a run"), "--to", "vllm", "--out", str(out)]) == 0
    (words,) = serving(capsys.readouterr().out)
    assert words[:3] == ["vllm", "serve", str(bases / "one")]
    template = ["--chat-template", str(out / "chat_template.jinja")]
    assert words[3:] == ["--enable-lora", "--max-lora-rank", "8", *template, "--lora-modules", f"a-run={out}"]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    base = AutoModelForCausalLM.from_pretrained(bases / "one")
    loaded = peft.PeftModel.from_pretrained(base, str(out))
    assert torch.allclose(said_by(loaded), wanted, atol=1e-5)
    said, factors = json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")
    scale = said["lora_alpha"] / said["r"]
    # as vLLM 0.30 adds it: one scale, whatever the patterns say
    model = AutoModelForCausalLM.from_pretrained(bases / "one")
    for module in {k.split(".lora_")[0].removeprefix("base_model.model.") for k in factors}:
        model.get_submodule(module).weight.data += scale * weight_of(factors, module)
        assert {f"base_model.model.{module}.lora_{side}.weight" for side in "AB"} <= set(factors)
        above, _, leaf = module.rpartition(".")
        for group in (g for g in VLLM.joined if leaf in g):
            assert all(f"base_model.model.{above}.{other}.lora_A.weight" in factors for other in group)
    assert torch.allclose(said_by(model), wanted, atol=1e-4)
    zeros = {k for k, t in factors.items() if not t.any()}
    own = {k for k in load_file(tmp_path / "a run" / "adapter_model.safetensors")}
    assert zeros == set(factors) - own and zeros


def test_tensors_that_need_no_other_scale_stay_as_they_are(bases, tmp_path, monkeypatch):
    trained(
        bases / "one", LayerLoraConfig(**COMMON, r=16, use_rslora=True, target_modules="all-linear"), tmp_path / "a"
    )
    monkeypatch.chdir(tmp_path / "a")
    found = export(".", "vllm")  # as the folder's own card says it
    assert found.folder == tmp_path / "a-vllm" and found.kind == "adapter"
    assert found.commands[0].words[-1] == f"a={tmp_path / 'a-vllm'}"
    old, new = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "a", found.folder))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    with pytest.raises(ExportError, match="is not empty"):
        export(str(tmp_path / "a"), "vllm")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(old, weights.with_suffix(".bin"))
    weights.unlink()
    (tmp_path / "a" / "layerpeft.json").unlink()
    for to in ("vllm", "gguf"):  # the cure is the same export, but for what is wrong with it
        with pytest.raises(
            ExportError, match=f"read safetensors; `layerpeft export .* --to {to} --whole --out .*b` goes"
        ):
            export(str(tmp_path / "a"), to, str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


WHOLE = {
    "full": LayerFullConfig(**COMMON),
    "galore": LayerGaloreConfig(**COMMON, r=4, update_proj_gap=2, target_modules=["q_proj"]),
    "head": LayerHeadConfig(**COMMON),
    "unlock": LayerUnlockConfig(**COMMON, biases=False),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", some(WHOLE, ("galore",)))
def test_what_is_more_than_factors_goes_as_a_whole_model(name, bases, tmp_path, capsys):
    wanted = trained(bases / "sharded", WHOLE[name], tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), "--to", "vllm"]) == 0
    assert serving(capsys.readouterr().out) == [["vllm", "serve", str(tmp_path / "a-vllm")]]
    assert torch.allclose(said_by(AutoModelForCausalLM.from_pretrained(tmp_path / "a-vllm")), wanted, atol=1e-4)
    # and from there without a file more
    assert main(["export", str(tmp_path / "a-vllm"), "--to", "gguf", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "model" and said["folder"] == str(tmp_path / "a-vllm")
    for line in said["commands"]:
        check(shlex.split(line["command"]))


@pytest.mark.parametrize("base", some(["sharded", "tied"], ("tied",)))
def test_a_merged_model_says_what_the_adapter_says(base, bases, tmp_path, capsys):
    config = LayerLoraConfig(**COMMON, r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    wanted = trained(bases / base, config, tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), "--to", "merged"]) == 0
    (words,) = serving(capsys.readouterr().out)
    assert words == ["layerpeft", "generate", str(tmp_path / "a-merged"), "--prompt", "Hello"]
    assert torch.allclose(said_by(AutoModelForCausalLM.from_pretrained(tmp_path / "a-merged")), wanted, atol=1e-4)
    files = {p.name for p in (bases / base).glob("model*")}
    assert {p.name for p in (tmp_path / "a-merged").glob("model*")} == files


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all at once": (
        {"r": 600, "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "init_lora_weights": "olora"},
        ["use_dora=True", "bias='lora_only'", "allowed: 'none'", "modules_to_save=['lm_head']", "classifier, score"]
        + ["rank 600: allowed: up to 512", "init_lora_weights='olora'", "gaussian, eva"],
    ),
    "lora_bias": ({"lora_bias": True}, ["lora_bias=True", "allowed: False"]),
    "a later option": ({"trainable_token_indices": [1]}, ["trainable_token_indices=[1]"]),
}


@pytest.mark.parametrize("name", some(REFUSED, ("all at once", "lora_bias")))
def test_what_vllm_does_not_take_is_said_at_once_and_the_cure_works(name, bases, tmp_path, capsys):
    given, fragments = REFUSED[name]
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | given
    if name != "all at once":
        trained(bases / "one", peft.LoraConfig(**options), tmp_path / "a")
    else:  # which PEFT does not make of one small linear: the file says it
        trained(bases / "one", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "a")
        path = tmp_path / "a" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | given))
        weights = tmp_path / "a" / "adapter_model.safetensors"
        held = {k: torch.zeros((600, 32) if "lora_A" in k else (32, 600)) for k in load_file(weights)}
        save_file(held, weights)
    assert main(["export", str(tmp_path / "a"), "--to", "vllm"]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments), said
    assert "goes to vllm as a whole model" in said and "cannot" not in said
    assert not (tmp_path / "a-vllm").exists()
    cure = shlex.split(re.findall(r"`(layerpeft export [^`]+)`", said)[0])
    assert cure[-1] == "--whole"
    if name != "all at once":
        assert main(cure[1:]) == 0
        assert serving(capsys.readouterr().out) == [["vllm", "serve", str(tmp_path / "a-vllm")]]


def test_a_head_of_classes_goes_where_the_base_has_one(bases, tmp_path, capsys):
    options = {"num_labels": 3, "pad_token_id": 0}
    LlamaForSequenceClassification(llama(**options).config).save_pretrained(tmp_path / "classes")
    for base, code in ((tmp_path / "classes", 0), (bases / "one", 2)):
        model = AutoModelForSequenceClassification.from_pretrained(base, **options)
        config = LayerLoraConfig(select="last:2", r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
        drawn(get_peft_model(model, config)).save_pretrained(tmp_path / f"a{code}")
        assert main(["export", str(tmp_path / f"a{code}"), "--to", "vllm"]) == code
    said = capsys.readouterr()
    (words,) = serving(said.out)
    assert words[3:6] == ["--runner", "pooling", "--enable-lora"]
    old, new = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("a0", "a0-vllm"))
    assert torch.equal(*(t["base_model.model.score.weight"] for t in (old, new)))
    assert "no head for classes" in said.err and "LlamaForCausalLM" in said.err


def test_models_that_no_server_knows_are_told_what_there_is(tmp_path, capsys):
    MODELS["gpt2"]().save_pretrained(tmp_path / "gpt2")
    trained(
        tmp_path / "gpt2",
        LayerLoraConfig(**COMMON, r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        tmp_path / "a",
    )
    assert main(["export", str(tmp_path / "a"), "--to", "vllm"]) == 2
    said = capsys.readouterr().err
    assert "'GPT2LMHeadModel'" in said and all(name in said for name in VLLM.architectures)
    MODELS["t5"]().save_pretrained(tmp_path / "t5")
    assert main(["export", str(tmp_path / "t5"), "--to", "vllm"]) == 2
    assert "no task for such models" in capsys.readouterr().err


def test_ranks_and_names_that_need_care(bases, tmp_path):
    trained(bases / "one", LayerLoraConfig(**COMMON, r=4, target_modules=["q_proj"]), tmp_path / "a")
    found = find(str(tmp_path / "a"))
    subject = Subject("a", found, None)
    adapter: Any = read_adapter(found.folder, adapter_config(found.folder))
    for rank, most in ((1, "1"), (2, "8"), (257, "320"), (512, "512")):
        factors = {n: replace(f, rank=rank) for n, f in adapter.factors.items()}
        there = replace(subject, adapter=replace(adapter, factors=factors, said={"revision": "v2"}))
        (command,) = vllm.commands(there, Path("out=1,2"), "a")
        check(list(command.words))
        assert command.words[command.words.index("--max-lora-rank") + 1] == most
        assert json.loads(command.words[-1]) == {"name": "a", "path": "out=1,2"}  # `name=path` would be cut in pieces
        assert "--revision" in command.words
    config = type(found.config).from_dict({**found.config.to_dict(), "tie_word_embeddings": True})
    for name, said, where in (
        ("lm_head", "lm_head: the base has its head and its embeddings in one tensor", replace(found, config=config)),
        ("model.other", "model.other: the base has no such linears", found),
    ):
        factors = {**adapter.factors, name: adapter.factors[f"{LAST}.q_proj"]}
        (problem,) = vllm.problems(Subject("a", where, replace(adapter, factors=factors)))
        assert problem.startswith(said)
    # a model without a gate has none to fill up (Nemotron)
    alone = replace(adapter, factors={"layers.0.mlp.up_proj": adapter.factors[f"{LAST}.q_proj"]})
    bare = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": torch.nn.Module()})])})
    assert vllm.added(alone, bare) == {}
    with pytest.raises(AssertionError, match="has no"):
        check(["vllm", "serve", "x", "--lora-module", "y"])


@pytest.mark.skipif(bool(missing_packages(["nf4", "hqq4"])), reason="without bitsandbytes and hqq")
def test_a_packed_base_is_named_with_what_to_give_instead(tmp_path, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    llama(**sizes).save_pretrained(tmp_path / "16bit")
    for folder, kinds in (("mixed", ("nf4", "hqq4")), ("nf4", ("nf4", "nf4"))):
        model = llama(**sizes)
        for i, kind in enumerate(kinds):
            name = f"model.layers.{i}.self_attn.q_proj"
            model.set_submodule(name, quantized_linear(model.get_submodule(name), kind, Storage()))
        save_model(model, tmp_path / folder)
    trained(tmp_path / "16bit", LayerLoraConfig(**COMMON, r=4, target_modules=["q_proj"]), tmp_path / "a")
    words = ["export", str(tmp_path / "a"), "--to", "vllm", "--base", str(tmp_path / "mixed")]
    assert main(words) == 2
    assert "layerpeft alone loads; name it in 16 bit: --base MODEL" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "nf4"), "--whole"]) == 2
    assert "would round what was trained" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "16bit"), "--whole"]) == 0
