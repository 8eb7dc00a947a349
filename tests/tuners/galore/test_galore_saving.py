"""What projection leaves: a stock LoRA adapter, a state to go on from, and a base that comes back bit for bit."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from layerpeft.errors import ConfigError
from layerpeft.tuners.galore.projection import held, running, state_of, trained_of
from tests.helpers.loops import llama
from tests.helpers.processes import without_the_package
from tests.helpers.projecting import (
    BATCHES,
    GAP,
    IDS,
    RANK,
    STATE,
    TARGETS,
    close,
    gpt2,
    logits,
    modules,
    parameters,
    same,
    train,
    wrap,
)

PLAIN = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerpeft":
            raise ImportError("layerpeft is not here")

sys.meta_path.insert(0, Block())
import peft, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
x, found = torch.tensor(json.loads(sys.argv[1])), []
for base, folder in json.loads(sys.argv[2]):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        found.append(model(input_ids=x).logits.tolist())
assert "layerpeft" not in sys.modules
print(json.dumps(found))
"""


# a stock adapter


def beyond():
    """So many folds that their factors would be larger than their sum."""
    return train(wrap(), 40)


SCENES = {
    "right": lambda: train(wrap()),
    "left": lambda: train(wrap(proj_type="left")),
    "std": lambda: train(wrap(proj_type="std", scale=1.0)),
    "base": lambda: train(wrap(fold="base", subspace="random")),
    "beyond": beyond,
    "named": lambda: train(wrap(adapter_name="mine")),
    "a new head besides": lambda: train(wrap(modules_to_save=["lm_head"])),
    "Conv1D right": lambda: train(wrap(gpt2(), (0, 2), target_modules=["c_attn", "c_proj", "c_fc"])),
    "Conv1D left": lambda: train(wrap(gpt2(), (0, 2), target_modules=["c_attn", "c_fc"], proj_type="left"), 30),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    llama().save_pretrained(folder / "llama")
    gpt2().save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Scene -> (live model, folder)."""
    found, root = {}, tmp_path_factory.mktemp("saved")
    for name, make in SCENES.items():
        model, folder = make(), root / name.replace(" ", "_")
        model.save_pretrained(folder)
        found[name] = model, folder / "mine" if name == "named" else folder
        layers = modules(model, "mine" if name == "named" else "default")
        assert layers and all(state_of(layer).folds.count >= 2 for layer in layers.values())
    return found


def test_plain_peft_gives_the_logits_of_the_live_model_without_the_package(saved, bases):
    pairs = [(str(bases / ("gpt2" if n.startswith("Conv1D") else "llama")), str(f)) for n, (_, f) in saved.items()]
    done = without_the_package(PLAIN, json.dumps(IDS.tolist()), json.dumps(pairs))
    assert done.returncode == 0, done.stderr[-2000:]
    for got, (name, (model, _)) in zip(json.loads(done.stdout.splitlines()[-1]), saved.items(), strict=True):
        untouched = logits(gpt2() if name.startswith("Conv1D") else llama())
        assert close(torch.tensor(got), logits(model)), name
        assert not close(torch.tensor(got), untouched, 5e-3), f"{name} trained nothing"


@pytest.mark.parametrize("scene", SCENES)
def test_the_folder_is_stock_and_carries_record_and_state(saved, scene):
    _, folder = saved[scene]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not {"update_proj_gap", "scale", "proj_type", "fold"} & set(config)
    manifest = json.loads((folder / "layerpeft.json").read_text())
    assert (
        manifest["method"] == "galore" and STATE in manifest["files"] and manifest["config"]["update_proj_gap"] == GAP
    )
    assert not list(folder.glob("*.partial")) and not list(folder.glob(".*.partial"))
    assert peft.PeftConfig.from_pretrained(folder).peft_type == "LORA"


def factors(folder, name):
    weights = load_file(folder / "adapter_model.safetensors")
    keys = [f"base_model.model.{name}.lora_{x}.weight" for x in "BA"]
    return [weights[k] for k in keys]


def most(model):
    """The one rank of a saved adapter: that of the module which needs most."""
    return max(held(layer)[0].shape[1] for layer in modules(model).values())


@pytest.mark.parametrize("scene", SCENES)
def test_one_rank_and_one_alpha_hold_for_every_module(saved, scene):
    model, folder = saved[scene]
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    scales = {config["lora_alpha"] / t.shape[0] for k, t in weights.items() if ".lora_A." in k}
    assert scales == {1.0} and config["rank_pattern"] == config["alpha_pattern"] == {}
    for name, layer in modules(model, "mine" if scene == "named" else "default").items():
        left, right = factors(folder, name)
        exact = held(layer)
        assert left.shape[1] == config["r"] and torch.equal(left[:, : exact[0].shape[1]], exact[0])
        torch.testing.assert_close(left @ right, exact[0] @ exact[1], atol=1e-8, rtol=1e-6)


def test_more_rank_than_the_weight_has_is_saved_exactly(saved):
    model, folder = saved["beyond"]
    for name, layer in modules(model).items():
        folds = state_of(layer).folds
        assert folds.count * RANK > min(folds.out, folds.into) and folds.dense is not None and not folds.pieces
        left, right = factors(folder, name)
        rank = min(folds.out, folds.into)
        assert left.shape[1] == most(model) >= rank and not left[:, rank:].any() and not right[rank:].any()
        now = running(layer)
        assert close(left @ right, folds.sum() + now[0] @ now[1], 1e-8)
        held = layer.get_base_layer().weight.detach() - state_of(layer).original
        assert close(folds.sum(), held, 1e-6)


def test_fewer_columns_are_stacked(saved):
    model, folder = saved["right"]
    for name, layer in modules(model).items():
        left, right = factors(folder, name)
        folds = state_of(layer).folds
        columns = (folds.count + 1) * RANK
        needed = min(columns, folds.out, folds.into)
        assert left.shape[1] == right.shape[0] == most(model) and not left[:, needed:].any()
        assert columns < min(folds.out, folds.into) or "v_proj" in name


def changes(model):
    merged = copy.deepcopy(model).merge_and_unload().get_parameter
    return {
        n: merged(f"{n}.weight").double() - state_of(layer).original.double() for n, layer in modules(model).items()
    }


def test_recompression_to_half_the_rank_reports_its_true_error(tmp_path):
    model = train(wrap(max_rank=8))
    model.save_pretrained(tmp_path)
    errors, best = {}, {}
    for name, change in changes(model).items():
        left, right = factors(tmp_path, name)
        assert left.shape[1] == 8 and state_of(modules(model)[name]).folds.count >= 3  # of sixteen or twenty
        errors[name] = float((change - left.double() @ right.double()).norm() / change.norm())
        strengths = torch.linalg.svdvals(change)
        best[name] = float(strengths[8:].norm() / strengths.norm())
    told = json.loads((tmp_path / "layerpeft.json").read_text())["checks"]["max_rank"]
    assert told["rank"] == 8 and told["largest_error"] == pytest.approx(max(errors.values()), rel=1e-4)
    assert 0.01 < max(errors.values()) < 1 and errors == pytest.approx(best, rel=1e-4)
    twin = wrap(max_rank=8)  # the state beside it is not cut
    twin.load_adapter(tmp_path, "default")
    assert torch.equal(logits(twin), logits(model))


def test_a_rank_that_is_large_enough_costs_nothing(tmp_path):
    model = train(wrap(max_rank=30))
    model.save_pretrained(tmp_path)
    assert "max_rank" not in json.loads((tmp_path / "layerpeft.json").read_text())["checks"]
    assert close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.spread(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_short_weights_what_is_saved_is_what_they_hold(tmp_path, dtype):
    model = train(wrap(llama().to(dtype)), rate=3e-2)
    model.save_pretrained(tmp_path)
    for name, layer in modules(model).items():
        assert layer.get_base_layer().weight.dtype == dtype and trained_of(layer).dtype == torch.float32
        left, right = factors(tmp_path, name)
        held = layer.get_base_layer().weight.detach().float() - state_of(layer).original.float()
        now = running(layer)
        assert torch.equal(left @ right, held + now[0] @ now[1])
        folds = state_of(layer).folds.sum()
        assert 0 < float((folds - held).abs().max()) < 2**-8  # rounded, and never twice
        # rounded at random, so that nothing is lost in the mean
        assert float((folds - held).sum().abs()) < 5 * float((folds - held).norm())
    plain = peft.PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    live, untouched = logits(model), logits(llama().to(dtype))
    assert float((logits(plain) - live).abs().max()) < 0.05 * float((untouched - live).abs().max())


def test_an_adapter_in_bfloat16(tmp_path):
    model = train(wrap(llama().to(torch.bfloat16), autocast_adapter_dtype=False), rate=3e-2)
    sums = [state_of(layer).folds.sum() for layer in modules(model).values()]
    assert {s.dtype for s in sums} == {torch.float32}
    model.save_pretrained(tmp_path)


# the base comes back


@pytest.mark.spread(2)
@pytest.mark.matrix("fold,dtype")
@pytest.mark.parametrize("fold", ["beside", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", ["right", "left"])
def test_the_base_comes_back_bit_for_bit(fold, dtype, proj_type):
    model = train(wrap(llama().to(dtype), fold=fold, proj_type=proj_type), rate=3e-2)
    live, base = logits(model), parameters(llama().to(dtype))
    working = {n: p for n, p in parameters(model).items() if "base_layer" in n}
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama().to(dtype)))
        shown = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in parameters(model).items()}
        assert same({n: p for n, p in shown.items() if ".lora_" not in n}, base)
    assert torch.equal(logits(model), live) and not torch.equal(live, logits(llama().to(dtype)))
    assert same({n: p for n, p in parameters(model).items() if "base_layer" in n}, working)
    assert same(parameters(model.unload()), base)


def test_in_training_only_folds_beside_give_the_base_at_once():
    for fold in ("beside", "base"):
        model = train(wrap(fold=fold)).train()
        if fold == "base":
            with pytest.raises(ConfigError, match="use fold='beside'"), model.disable_adapter():
                pass
            assert close(logits(model), logits(train(wrap())), 0)  # as before
        else:
            with model.disable_adapter():
                assert torch.equal(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)


def test_a_reference_pass_between_forward_and_backward_changes_no_gradient():
    grads = []
    for between in (False, True):
        model = train(wrap(), 7).train()
        loss = model(**BATCHES[0]).loss
        if between:
            with torch.no_grad(), model.disable_adapter():
                model(**BATCHES[1])
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0] and same(*grads)


@pytest.mark.parametrize("scene", ["right", "left", "beyond", "Conv1D right", "Conv1D left", "base"])
def test_merging_equals_the_live_model(saved, scene):
    model = copy.deepcopy(saved[scene][0])
    live = logits(model)
    model.merge_adapter()
    assert close(logits(model), live, 1e-5)
    model.unmerge_adapter()
    assert close(logits(model), live, 1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(".lora_" in n for n, _ in merged.named_parameters()) and close(logits(merged), live, 1e-5)


@pytest.mark.parametrize("fold", ["beside", "base"])
def test_a_merged_model_gives_its_base_back(fold):
    model = train(wrap(fold=fold))
    live = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert close(logits(model), live, 1e-5)
    assert same(parameters(model.unload()), parameters(llama()))


def test_merging_another_adapter_leaves_the_folds_out():
    model = train(wrap())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(llama()))
    assert close(logits(model.merge_and_unload()), logits(llama()), 1e-6)
