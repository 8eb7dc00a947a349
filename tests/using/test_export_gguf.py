"""Adapters for llama.cpp, read back by gguf's own reader, and Modelfiles for Ollama."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.integrations import gguf as packages
from layerpeft.tuners.load import adapter_config
from layerpeft.using.export import gguf, ollama
from layerpeft.using.export.adapter import read_adapter
from layerpeft.using.export.limits import LAYOUTS
from layerpeft.using.export.subject import Subject
from layerpeft.using.folder import find
from tests.helpers.loops import llama
from tests.helpers.models import MODELS
from tests.helpers.repeating import some
from tests.helpers.serving import check, check_modelfile, serving

reader = pytest.importorskip("gguf", reason="without gguf")
LAST = "model.layers.3"
CALLED = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def trained(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An adapter on all linears of the last two layers, saved; the model with it."""
    given = {
        "select": "last:2",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    } | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LayerLoraConfig(**given)).to(dtype)
    draw = torch.Generator().manual_seed(3)
    for _, tensor in model.named_parameters():
        if tensor.requires_grad:
            tensor.data += (0.3 * torch.randn(tensor.shape, generator=draw)).to(dtype)
    model.save_pretrained(str(folder))
    return model.eval()


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the file says of itself, and its tensors, as torch has their shapes."""
    found = reader.GGUFReader(path)
    fields = {name: field.contents() for name, field in found.fields.items()}
    assert all(t.tensor_type == reader.GGMLQuantizationType.F32 for t in found.tensors)
    return fields, {
        t.name: torch.tensor(t.data).reshape(tuple(int(n) for n in reversed(t.shape))) for t in found.tensors
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "base"
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float32], 1))
def test_the_file_holds_what_was_trained(dtype, base, tmp_path, capsys):
    options = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    model = trained(base, tmp_path / "a", dtype, **options)
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["export", str(tmp_path / "a"), "--to", "gguf"]) == 0
    file = str(tmp_path / "a-gguf" / "base.gguf")
    convert, serve = serving(capsys.readouterr().out)
    assert convert == ["python", "convert_hf_to_gguf.py", str(base), "--outfile", file]
    template = str(tmp_path / "a-gguf" / "chat_template.jinja")
    assert serve[:5] == ["llama-server", "-m", file, "--lora", str(tmp_path / "a-gguf" / "adapter.gguf")]
    assert serve[5:] == ["--jinja", "--chat-template-file", template] and Path(template).is_file()
    fields, tensors = read_back(tmp_path / "a-gguf" / "adapter.gguf")
    said = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    assert {name: fields[name] for name in said} == said
    assert len(tensors) == 2 * 2 * len(CALLED)
    for ours, theirs in CALLED.items():
        layer = model.get_submodule(f"base_model.model.{LAST}.{ours}")
        a, b = (layer.get_submodule(f"lora_{side}.default").weight.detach().float() for side in "AB")
        scale = layer.scaling["default"]
        rank = len(a)
        assert torch.equal(tensors[f"blk.3.{theirs}.weight.lora_a"], a)
        # llama.cpp multiplies by alpha and divides by the rank of each tensor (get_scale)
        b = b * (scale * rank / 8.0) if scale * rank != 8.0 else b
        heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
        if heads:  # as conversion/llama.py turns the weight itself
            b = b.reshape(heads, 2, len(b) // heads // 2, rank).swapaxes(1, 2).reshape(b.shape)
        assert torch.equal(tensors[f"blk.3.{theirs}.weight.lora_b"], b)


def test_turned_rows_rotated_in_pairs_attend_as_transformers_does(base, tmp_path):
    """llama.cpp rotates numbers that lie beside each other, transformers those half a head apart: with the rows of the file, and of
    the base as its converter turns them, every score of attention is the same, and turned back the logits are."""
    model = trained(base, tmp_path / "a", target_modules=["q_proj", "k_proj"])
    main(["export", str(tmp_path / "a"), "--to", "gguf"])
    fields, tensors = read_back(tmp_path / "a-gguf" / "adapter.gguf")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    length, size = 7, 8
    x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(1))
    cos, sin = plain.model.rotary_emb(x, torch.arange(length)[None])
    theirs, ours, back = [], [], AutoModelForCausalLM.from_pretrained(base).eval()
    for name, heads in (("q", 4), ("k", 2)):
        layer = model.get_submodule(f"base_model.model.{LAST}.self_attn.{name}_proj")
        theirs.append(layer(x).view(1, length, heads, size).transpose(1, 2))
        a, b = (tensors[f"blk.3.attn_{name}.weight.lora_{side}"] for side in "ab")
        where = gguf.order(heads * size, heads)
        turned = layer.base_layer.weight[where] + (fields["adapter.lora.alpha"] / len(a)) * b @ a
        ours.append((x @ turned.T).view(1, length, heads, size // 2, 2).transpose(1, 2))
        for i in (2, 3):
            a, b = (tensors[f"blk.{i}.attn_{name}.weight.lora_{side}"] for side in "ab")
            back.model.layers[i].self_attn.get_submodule(f"{name}_proj").weight.data += 2 * b[torch.argsort(where)] @ a
    q, k = apply_rotary_pos_emb(*theirs, cos, sin)
    c, s = (t[0, :, : size // 2] for t in (cos, sin))
    rotated = [
        torch.stack([t[..., 0] * c - t[..., 1] * s, t[..., 0] * s + t[..., 1] * c], -1).flatten(-2) for t in ours
    ]
    scores = [a @ b.repeat_interleave(2, 1).transpose(-1, -2) for a, b in ((q, k), rotated)]
    assert torch.allclose(*scores, atol=1e-4) and scores[0].std() > 0.1
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(back(ids).logits, model(ids).logits, atol=1e-4)


OTHERS = ["qwen3", "gemma3_text", "phi3", "qwen2", "mistral", "granite", "gemma2", "starcoder2"]


@pytest.mark.parametrize("name", some(OTHERS, 1))
def test_rows_are_turned_where_the_architecture_needs_it_and_nowhere_else(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "a")
    found = find(str(tmp_path / "a"))
    adapter = read_adapter(found.folder, adapter_config(found.folder))
    subject = Subject("a", found, adapter)
    layout = LAYOUTS[subject.architecture]
    assert not gguf.problems(subject)
    gguf.write(subject, tmp_path, "a")
    fields, tensors = read_back(tmp_path / "adapter.gguf")
    assert fields["general.architecture"] == layout.name and len(tensors) == 2 * len(adapter.factors)
    called = packages.names_of(layout.name, found.config.num_hidden_layers)
    for module in adapter.factors:
        found_b = tensors[f"{called(module)}.weight.lora_b"]
        rotates = module.endswith((".q_proj", ".k_proj"))
        assert torch.equal(found_b, adapter.read(module, "B").float()) != (rotates and layout.turned)


def test_what_llama_cpp_does_not_take_is_said_with_what_it_does(base, tmp_path, capsys):
    MODELS["gpt2"]().save_pretrained(tmp_path / "gpt2")
    trained(tmp_path / "gpt2", tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)
    assert main(["export", str(tmp_path / "a"), "--to", "gguf"]) == 2
    said = capsys.readouterr().err
    assert "'GPT2LMHeadModel'" in said and all(name in said for name in LAYOUTS) and "lora_bias=True" in said
    assert "`layerpeft export" in said and "--to gguf --whole`" in said and not (tmp_path / "a-gguf").exists()
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    trained(tmp_path / "tied", tmp_path / "b", target_modules=["q_proj"])
    found = find(str(tmp_path / "b"))
    adapter: Any = read_adapter(found.folder, adapter_config(found.folder))
    more = {
        **adapter.factors,
        "lm_head": adapter.factors[f"{LAST}.self_attn.q_proj"],
        f"{LAST}.mlp.strange": next(iter(adapter.factors.values())),
    }
    said = " ".join(gguf.problems(Subject("b", found, replace(adapter, factors=more))))
    assert "one tensor" in said and "mlp.strange: llama.cpp has no such linears" in said


def test_without_the_package_it_says_how_to_get_it(base, tmp_path, monkeypatch, capsys):
    trained(base, tmp_path / "a")
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for to in ("gguf", "ollama"):
        assert main(["export", str(tmp_path / "a"), "--to", to]) == 2
        said = capsys.readouterr().err
        assert "pip install 'layerpeft[gguf]'" in said and f"is not exported to {to}" in said
        assert "as a whole model" not in said, "an adapter goes, once the package is there"


def test_a_modelfile_begins_with_the_base_or_with_the_model_beside_it(base, tmp_path, capsys):
    trained(base, tmp_path / "My Run")
    for more, start in (([], str(base)), (["--from", "llama3.2:1b"], "llama3.2:1b")):
        out = tmp_path / f"o{len(more)}"
        assert main(["export", str(tmp_path / "My Run"), "--to", "ollama", "--out", str(out), *more]) == 0
        create, run = serving(capsys.readouterr().out)
        assert create == ["ollama", "create", "my-run", "-f", str(out / "Modelfile")] and run == [
            "ollama",
            "run",
            "my-run",
        ]
        assert check_modelfile(out / "Modelfile") == {"FROM": start, "ADAPTER": "./adapter.gguf"}
        assert read_back(out / "adapter.gguf")[1]
    assert main(["export", str(tmp_path / "My Run"), "--to", "ollama", "--whole", "--out", str(tmp_path / "w")]) == 0
    serving(capsys.readouterr().out)
    assert check_modelfile(tmp_path / "w" / "Modelfile") == {"FROM": "."}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "w") is not None
    assert main(["export", str(tmp_path / "w"), "--to", "ollama", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["Modelfile"]
    assert check_modelfile(tmp_path / "w-ollama" / "Modelfile") == {"FROM": str(tmp_path / "w")}
    ollama_from = ["--to", "ollama", "--from"]
    for wrong in (["--to", "vllm", "--from", "x"], [*ollama_from, "x", "--whole"], [*ollama_from, "a\nb"]):
        assert main(["export", str(tmp_path / "My Run"), *wrong, "--out", str(tmp_path / "never")]) == 2
        assert "--from" in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_a_base_on_the_hub_is_fetched_by_name_and_ollama_is_told_its_own_name_for_it(base, tmp_path):
    trained(base, tmp_path / "a")
    found = replace(find(str(tmp_path / "a")), base="org/model")
    subject = Subject("a", found, read_adapter(found.folder, adapter_config(found.folder)))
    convert, _ = gguf.commands(subject, Path("out"), "a")
    assert convert.words == ("python", "convert_hf_to_gguf.py", "org/model", "--outfile", "out/base.gguf", "--remote")
    check(list(convert.words))
    (problem,) = ollama.problems(subject)
    cure = shlex.split(problem.rpartition(": ")[2])
    assert cure == ["layerpeft", "export", "a", "--to", "ollama", "--from", "MODEL"]
    assert not ollama.problems(replace(subject, start="llama3.2:1b"))
    config = type(found.config).from_dict({**found.config.to_dict(), "architectures": ["Qwen3ForCausalLM"]})
    (problem,) = ollama.problems(replace(subject, found=replace(found, base=str(base), config=config)))
    assert (
        "Ollama imports folders of LlamaForCausalLM" in problem
        and "--outfile base.gguf` makes a file for --from" in problem
    )
