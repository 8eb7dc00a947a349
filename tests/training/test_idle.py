"""What you asked for is what trains, or it stops: also where an adapter was loaded, frozen, switched off or is not active."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.errors import TrainingError
from tests.helpers.loops import llama, make_batches, step
from tests.helpers.scheduling import rows

CONFIGS = {
    "lora": lambda: LayerLoraConfig(select="last:2", r=4, task_type="CAUSAL_LM"),
    "projection": lambda: LayerGaloreConfig(select="last:2", r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "full": lambda: LayerFullConfig(select="last:1", task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind, config in CONFIGS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        get_peft_model(llama(), config()).save_pretrained(found[kind])
    return found


def by_trainer(model, folder):
    model.enable_input_require_grads()  # as TRL does, so that a backward pass runs whatever trains
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows(8)).train()


def by_loop(model, folder):
    model.enable_input_require_grads()
    step(model.train(), torch.optim.AdamW(model.parameters(), 1e-2), make_batches()[0])


def frozen(model):
    return model.requires_grad_(False)


def off(model):
    model.base_model.disable_adapter_layers()
    return model


def inactive(model):
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["model.layers.0.self_attn.k_proj"]))
    model.set_adapter("b", inference_mode=True)
    return model


WAYS = {
    "loaded": (lambda kind, f: layerpeft.load(f, llama()), "is_trainable=True"),
    "frozen": (lambda kind, f: frozen(get_peft_model(llama(), CONFIGS[kind]())), "requires_grad_"),
    "switched off": (lambda kind, f: off(get_peft_model(llama(), CONFIGS[kind]())), "enable_adapter_layers"),
    "not active": (lambda kind, f: inactive(get_peft_model(llama(), CONFIGS[kind]())), "set_adapter"),
    "loaded by PEFT": (lambda kind, f: peft.PeftModel.from_pretrained(llama(), f), "is_trainable=True"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["lora", *(pytest.param(k, marks=pytest.mark.slow) for k in ("projection", "full"))])
def test_a_run_that_would_train_nothing_stops_before_it_begins(way, kind, folders, tmp_path):
    make, says = WAYS[way]
    model = make(kind, folders[kind])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match="nothing .*would train") as error:
        by_trainer(model, tmp_path)
    assert says in str(error.value)
    if way != "loaded by PEFT":  # of which a loop of one's own tells nobody
        with pytest.raises(TrainingError):
            by_loop(model, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_is_loaded_to_be_trained_trains_and_a_frozen_neighbour_is_no_fault(folders, tmp_path):
    reference = layerpeft.load(folders["lora"], llama())
    model = layerpeft.load(folders["lora"], llama(), is_trainable=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    by_trainer(model, tmp_path)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".lora_" in n for n in moved) and not any(p.requires_grad for p in reference.parameters())


def test_another_adapter_trains_over_one_that_was_loaded(folders, tmp_path):
    model = layerpeft.load(folders["lora"], llama())
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("b")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    by_trainer(model, tmp_path)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".b." in n for n in moved)
