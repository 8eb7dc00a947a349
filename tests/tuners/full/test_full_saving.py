"""What full training leaves: the modules that changed, as plain PEFT loads them, with nothing of layerpeft in the process."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

import layerpeft
from layerpeft.saving.manifest import read_manifest
from layerpeft.tuners.full.layer import FullWrapper, full_layers, keep_originals, loaded_modules
from layerpeft.tuners.merge import merge
from tests.helpers.fulling import (
    BATCHES,
    IDS,
    by_hand,
    clean,
    logits,
    originals_of,
    parameters,
    same,
    train,
    trains,
    unloaded,
    wrap,
)
from tests.helpers.loops import llama
from tests.helpers.models import MODELS, batch
from tests.helpers.processes import without_the_package

PLAIN = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerpeft":
            raise ImportError("layerpeft is not here")

sys.meta_path.insert(0, Block())
import peft, torch, transformers

torch.set_num_threads(1)
found = []
for kind, base, folder, inputs in torch.load(sys.argv[1]):
    model = peft.PeftModel.from_pretrained(getattr(transformers, kind).from_pretrained(base), folder).eval()
    with torch.no_grad():
        first = model(**inputs).logits
        found.append((first, model.merge_and_unload()(**inputs).logits))
assert "layerpeft" not in sys.modules
torch.save(found, sys.argv[2])
"""


def kept(model, adapter="default"):
    keep_originals(model, adapter)
    return model


def conv1d():
    model = MODELS["gpt2"]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def tied():
    return llama(tie_word_embeddings=True)


SCENES = {
    "static": (llama, {"select": [1, 3]}),
    "all layers": (llama, {"select": "all"}),
    "norms": (llama, {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "linears": (llama, {"target_modules": "all-linear"}),
    "another name": (llama, {"adapter_name": "mine"}),
    "embeddings and head": (llama, {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}),
    "tied embeddings": (tied, {"modules_to_save": ["embed_tokens"]}),
    "tied head": (tied, {"modules_to_save": ["lm_head"]}),
    "conv1d": (conv1d, {}),
    "experts": (MODELS["mixtral"], {}),
    "experts and sinks": (MODELS["gpt_oss"], {}),
    "single experts": (MODELS["mixtral"], {"select": {"layers": [1, 7], "unit": "expert"}}),
    "mamba": (MODELS["jamba"], {}),
    "encoder-decoder": (MODELS["t5"], {"task_type": "SEQ_2_SEQ_LM"}),
    "tied encoder-decoder": (MODELS["t5"], {"task_type": "SEQ_2_SEQ_LM", "modules_to_save": ["shared"]}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every scene trained, saved, and loaded in one process that cannot import layerpeft."""
    root = tmp_path_factory.mktemp("scenes")
    jobs, found = [], {}
    for name, (make, options) in SCENES.items():
        base = make()
        base.save_pretrained(root / name / "base")
        adapter = options.get("adapter_name", "default")
        inputs = {**batch("t5", base), "input_ids": IDS} if "decoder" in name else {"input_ids": IDS}
        model = kept(wrap(base, **options), adapter)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.5).add_(0.01 * torch.randn_like(parameter))
        folder = root / name / "saved"
        model.eval().save_pretrained(folder)
        folder = folder / "mine" if adapter == "mine" else folder
        with torch.no_grad():
            wanted = model(**inputs).logits
            assert not torch.equal(wanted, AutoModel(base, root / name / "base")(**inputs).logits)
        jobs.append((type(make()).__name__, str(root / name / "base"), str(folder), inputs))
        found[name] = (folder, model, wanted, inputs)
    torch.save(jobs, root / "jobs.pt")
    done = without_the_package(PLAIN, root / "jobs.pt", root / "found.pt")
    assert done.returncode == 0, done.stderr[-4000:]
    plain = dict(zip(SCENES, torch.load(root / "found.pt"), strict=True))
    return root, found, plain


def AutoModel(like, folder):  # noqa: N802
    """The base as it was."""
    return type(like).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", SCENES)
def test_plain_peft_gives_the_same_logits_and_merges_to_them(folders, name):
    _, found, plain = folders
    folder, model, wanted, _ = found[name]
    assert torch.equal(plain[name][0], wanted) and torch.equal(plain[name][1], wanted)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["target_modules"] == "dummy-target-modules"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not any("original_module" in k or "lora" in k for k in tensors)
    assert len(config["modules_to_save"]) == len(set(config["modules_to_save"]))
    assert read_manifest(folder)["method"] == "full"


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", ["static", "conv1d", "experts", "encoder-decoder", "tied embeddings"])
def test_a_folder_merges_to_a_model_that_plain_transformers_loads(folders, name, tmp_path):
    root, found, _ = folders
    folder, model, wanted, inputs = found[name]
    out = merge(folder, tmp_path / "merged", type(model.get_base_model()).from_pretrained(root / name / "base"))
    plain = type(model.get_base_model()).from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, wanted)


def test_our_own_load_reports_the_change_and_shows_the_base(folders):
    root, found, _ = folders
    folder, model, wanted, inputs = found["static"]
    loaded = layerpeft.load(folder, AutoModelForCausalLM.from_pretrained(root / "static" / "base"))
    assert isinstance(next(iter(full_layers(loaded, "default").values())), FullWrapper)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, wanted)
    changes = [[r.change for r in layerpeft.layer_report(m).rows] for m in (loaded, model)]
    assert [c is None for c in changes[0]] == [c is None for c in changes[1]] == [True, False, True, False]
    assert [c for c in changes[0] if c] == pytest.approx([c for c in changes[1] if c], rel=1e-6)
    assert same(unloaded(loaded), parameters(AutoModelForCausalLM.from_pretrained(root / "static" / "base")))
    assert not trains(loaded)
    again = layerpeft.load(folder, AutoModelForCausalLM.from_pretrained(root / "static" / "base"), is_trainable=True)
    assert trains(again) == trains(model)


def test_only_what_was_ever_active_is_saved(tmp_path):
    model = wrap(select="all")
    names = ["model.layers.1.mlp.up_proj", "model.layers.2.input_layernorm"]
    keep_originals(model, "default", names)
    model.get_submodule(f"base_model.model.{names[0]}").weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{n}.weight" for n in names}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == names
    assert model.peft_config["default"].modules_to_save != names  # the live pool is as it was
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(plain), logits(model))


def test_before_anything_has_trained_all_that_was_chosen_is_saved(tmp_path):
    model = wrap(select=[0, 2])
    model.save_pretrained(tmp_path)
    keys = {clean(k) for k in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == trains(model)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(llama()))


def test_a_partial_folder_goes_into_a_live_pool(tmp_path):
    turns = {"pick": "uniform", "keep": 1, "reselect_steps": 5}
    first = wrap(select=turns)
    train(first, 3)
    first.save_pretrained(tmp_path)
    names = set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"])
    assert len({n.split(".")[2] for n in names}) == 1
    live = wrap(select=turns)
    ids = {clean(n): id(p) for n, p in live.named_parameters()}
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert loaded_modules(live, "default", state, "base_model.model.") == names
    live.load_adapter(tmp_path, "default", is_trainable=True)
    assert same(parameters(live), parameters(first))
    assert {clean(n): id(p) for n, p in live.named_parameters()} == ids
    assert {n.removesuffix(".weight") for n in originals_of(live, "default")} == names
    assert same(unloaded(live), parameters(llama()))
    live.save_pretrained(tmp_path / "again")
    one, two = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert same(one, two)


def test_saving_while_the_base_is_shown_saves_what_was_trained(tmp_path):
    model = kept(wrap(select=[1]))
    train(model)
    with model.disable_adapter():
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_tied_weights_stay_tied_while_they_train():
    model = kept(wrap(tied(), modules_to_save=["embed_tokens"]))
    train(model, 2)
    base = model.get_base_model()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    hand = tied()
    for name, parameter in hand.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers.3.") or "embed_tokens" in name)
    train(hand, 2)
    assert torch.equal(logits(model), logits(hand))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tied()))
    assert torch.equal(logits(model), logits(hand))


@pytest.fixture
def bert(tmp_path):
    """A BERT on the disk without a head for three classes."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 64,
    }
    folder = tmp_path / "bert"
    BertForSequenceClassification(BertConfig(**sizes, num_labels=2)).bert.save_pretrained(folder)
    return folder


def test_a_new_head_trains_besides_and_is_saved(bert, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    plain = copy.deepcopy(base)
    model = wrap(base, select="last:1", task_type="SEQ_CLS")
    names = trains(model)
    assert {"classifier.weight", "classifier.bias"} < names
    assert all(n.startswith(("bert.encoder.layer.2.", "classifier.", "bert.pooler")) for n in names)
    assert "classifier" in model.peft_config["default"]._layerpeft.new_tensors
    keep_originals(model, "default")
    inputs = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    for one in (model, plain):
        one.train()
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], 1e-2)
        for number in range(3):
            torch.manual_seed(number)
            one(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(parameters(model), parameters(plain))
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(5)
    other = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_the_hand_written_weights_are_in_the_folder(tmp_path):
    model = kept(wrap(select=[1, 3]))
    train(model)
    model.save_pretrained(tmp_path)
    hand = parameters(by_hand((1, 3)))
    found = {clean(k): t for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert found and all(torch.equal(t, hand[n]) for n, t in found.items())
    assert BATCHES[0]["input_ids"].shape == (2, 12)
