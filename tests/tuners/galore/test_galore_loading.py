"""A projection that is loaded again, copied or pickled: it goes on as it was, or it says why not and stays as it is."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.errors import LayerpeftError, SaveError
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.peft import lora_layers
from layerpeft.tuners.galore.projection import state_of
from tests.helpers.loops import adamw, llama
from tests.helpers.projecting import (
    GAP,
    STATE,
    close,
    gradients,
    logits,
    modules,
    parameters,
    same,
    snapshot,
    train,
    trained,
    wrap,
)
from tests.helpers.repeating import repeated


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(live model, folder)"""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = train(wrap())
    model.save_pretrained(folder)
    return model, folder


# with the state that lies beside it


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize("before", [0, 5, 30])
@pytest.mark.parametrize("fold", ["beside", "base"])
def test_a_live_projection_takes_over_all_of_it(saved, before, fold):
    model, folder = saved
    twin = train(wrap(fold=fold), before)
    twin.load_adapter(folder, "default", is_trainable=True)
    assert same(snapshot(twin), snapshot(model))
    assert torch.equal(logits(twin), logits(model))
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(llama()))
    assert same(parameters(twin.unload()), parameters(llama()))


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["sketch", "svd", "random"])
@pytest.mark.parametrize("at", range(2, 6))
def test_a_loop_goes_on_bit_for_bit_from_any_step(tmp_path, kind, at):
    options = {"subspace": kind, "moments": "project", "gap_overlap": 0.2}
    whole = wrap(**options)
    optimizer = adamw(whole)
    train(whole, at, optimizer=optimizer)
    whole.save_pretrained(tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    train(whole, 8, optimizer=optimizer, start=at)
    twin = wrap(**options)
    twin.load_adapter(tmp_path, "default", is_trainable=True)
    again = adamw(twin)
    again.load_state_dict(kept)
    train(twin, 8, optimizer=again, start=at)
    assert same(snapshot(twin), snapshot(whole))
    for one, other in zip(trained(twin), trained(whole), strict=True):
        ours, theirs = again.state[one], optimizer.state[other]
        assert set(ours) == set(theirs) and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_short_weights_go_on_bit_for_bit(tmp_path):
    model = train(wrap(llama().bfloat16()), rate=3e-2)
    model.save_pretrained(tmp_path)
    twin = wrap(llama().bfloat16())
    twin.load_adapter(tmp_path, "default")
    assert same(snapshot(twin), snapshot(model)) and torch.equal(logits(twin), logits(model))


def test_saving_again_replaces_everything(tmp_path):
    model = train(wrap())
    for _ in range(2):
        train(model, 4)
        model.save_pretrained(tmp_path)
    twin = wrap()
    twin.load_adapter(tmp_path, "default")
    assert torch.equal(logits(twin), logits(model))
    assert close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


# with anything else


def flip(name):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def stock(folder):
    shutil.rmtree(folder)
    targets = sorted(modules(wrap()))
    peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=targets)).save_pretrained(folder)


def other(**options):
    def replace(folder):
        shutil.rmtree(folder)
        train(wrap(**options)).save_pretrained(folder)

    return replace


WRONG = {
    "a stock adapter": (stock, "holds no layerpeft_state.safetensors"),
    "no state": (lambda f: (f / STATE).unlink(), STATE),
    "a damaged state": (flip(STATE), "layerpeft_state.safetensors was altered"),
    "a truncated state": (cut(STATE), "layerpeft_state.safetensors is truncated"),
    "damaged weights": (flip("adapter_model.safetensors"), "adapter_model.safetensors was altered"),
    "no manifest": (lambda f: (f / "layerpeft.json").unlink(), "has no layerpeft.json"),
    "another selection": (other(select=(0, 2)), "trains other targets than this model"),
    "another rank": (other(r=6), "r"),
    "another side": (other(proj_type="left"), "proj_type"),
    "another scale": (other(scale=0.5), "scale"),
}


@pytest.mark.spread(2)
@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(saved, tmp_path, what):
    damage, says = WRONG[what]
    folder = tmp_path / "adapter"
    shutil.copytree(saved[1], folder)
    damage(folder)
    model = train(wrap(), 4).train()
    before = snapshot(model)
    with pytest.raises(LayerpeftError, match=says) as error:
        model.load_adapter(folder, "default")
    assert same(snapshot(model), before) and "Traceback" not in str(error.value)
    twin = train(wrap(), 4).train()
    assert torch.equal(logits(train(model, 3)), logits(train(twin, 3)))  # and it can be trained on


def test_the_state_of_a_model_alone_is_refused():
    model = train(wrap())
    before = snapshot(model)
    with pytest.raises(SaveError, match="cannot go on from an adapter alone"):
        model.load_state_dict(model.state_dict())
    assert same(snapshot(model), before)


def test_a_second_adapter_is_loaded_beside_it(tmp_path):
    targets = sorted(modules(wrap()))
    stranger = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    stranger.save_pretrained(tmp_path)
    model = train(wrap())
    live, before = logits(model), snapshot(model)
    model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model), live)
    model.set_adapter("second")
    assert close(logits(model), logits(stranger), 1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(model), live)
    model.delete_adapter("second")
    assert same(snapshot(model), before)
    fixed = [p for n, p in model.named_parameters() if ".lora_A." in n]
    assert fixed and not any(p.requires_grad for p in fixed)


# as an ordinary adapter


def test_loaded_by_layerpeft_it_is_ordinary_lora(saved, tmp_path):
    live, folder = saved
    model = layerpeft.load(folder, llama())
    assert close(logits(model), logits(live)) and not trained(model)
    model = layerpeft.load(folder, llama(), is_trainable=True)
    config = model.peft_config["default"]
    assert isinstance(config, peft.LoraConfig) and config.peft_type == "LORA"
    layers = lora_layers(model.base_model.model, "default")
    assert set(layers) == set(modules(live)) and not any(hasattr(m, "_layerpeft") for m in layers.values())
    held = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.partition(".default")[0].rpartition(".")[2] for n in held} == {"lora_A", "lora_B"}
    assert len(held) == 2 * len(layers)
    before = logits(model)
    train(model, 3)
    layerpeft.check_trained(model)
    assert not close(logits(model), before, 1e-3)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / STATE).exists()
    assert close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model), 1e-5)


def test_loading_it_to_train_says_that_it_is_ordinary_lora_now(saved, caplog):
    with caplog.at_level(logging.INFO, logger="layerpeft"):
        layerpeft.load(saved[1], llama(), is_trainable=True)
    assert "LoRA" in caplog.text


# over quantized weights


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("wide")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def four_bit(folder):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    keep_cpu_layout(model)
    return model


@pytest.mark.parametrize("proj_type", [repeated("right"), "left"])
def test_over_four_bits_folds_stay_beside(wide, tmp_path, proj_type):
    model = train(wrap(four_bit(wide), proj_type=proj_type), 10)
    for layer in modules(model).values():
        state, packed = state_of(layer), layer.get_base_layer().weight
        assert state.folds.count >= 3 and state.original is None and len(state.beside) == 1
        assert packed.dtype == torch.uint8
    live, base = logits(model), logits(four_bit(wide))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), live) and not close(live, base, 1e-2)
    model.save_pretrained(tmp_path)
    plain = four_bit(wide)
    assert close(logits(peft.PeftModel.from_pretrained(plain, tmp_path)), live)
    twin = wrap(four_bit(wide), proj_type=proj_type)
    twin.load_adapter(tmp_path, "default")
    assert torch.equal(logits(twin), live)
    change = [r.change for r in layerpeft.layer_report(model).rows]
    assert [c is not None and c > 0 for c in change] == [False, True, False, True]
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("how", [repeated("merge_adapter"), "merge_and_unload"])
def test_four_bits_are_merged_with_their_folds(wide, tmp_path, how):
    model = train(wrap(four_bit(wide)), 10)
    live, base = logits(model), logits(four_bit(wide))
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(four_bit(wide), tmp_path).merge_and_unload()
    merged = getattr(model, how)() or model
    size = float((base - live).norm())
    assert float((logits(merged) - logits(plain)).norm()) < 0.1 * size  # both rounded to four bits, to the same
    assert float((logits(merged) - live).norm()) < 0.7 * size
    if how == "merge_adapter":
        model.unmerge_adapter()
        assert torch.equal(logits(model), live)
        model.merge_adapter()
        assert torch.equal(logits(model.unload()), base)


# copies


def test_a_copy_is_the_same_model_and_goes_its_own_way():
    model = train(wrap())
    twin, before = copy.deepcopy(model), snapshot(model)
    assert torch.equal(logits(twin), logits(model)) and same(snapshot(twin), before)
    train(twin, 5)
    assert same(snapshot(model), before) and not same(snapshot(twin), before)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(llama()))


def test_a_copy_has_the_gradients_of_the_model():
    model = train(wrap())
    twin = copy.deepcopy(model)
    assert same(gradients(twin), gradients(model))


def test_a_copy_goes_on_as_the_model_does():
    losses = []
    for copied in (False, True):
        model = train(wrap(stagger=False), 3)  # the next step is due
        model = copy.deepcopy(model) if copied else model
        train(model, 5)
        losses.append(logits(model))
    assert torch.equal(*losses)


@pytest.mark.parametrize("gap", [GAP, 100])
def test_a_pickle_is_the_same_model(gap):
    model = train(wrap(update_proj_gap=gap, stagger=False), 3)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model)) and same(gradients(twin), gradients(model))


def test_a_choice_that_waited_goes_on_with_what_was_folded(tmp_path):
    select = {"by": "gradient_norm", "keep": 2}
    options = {"r": 4, "update_proj_gap": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    one, other = (layerpeft.get_peft_model(llama(), LayerGaloreConfig(select=select, **options)).train() for _ in "12")
    train(one, steps=4)
    one.save_pretrained(tmp_path)
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(state_of(layer).folds.count for layer in modules(other).values())
    assert same(parameters(other), parameters(one))
