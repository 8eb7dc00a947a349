"""The same config, by every door, trains the same elements to the same values over a packed base."""

import copy
import json
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer import DEFAULT_CALLBACKS
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import prepare_peft_model

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model, quantize
from layerpeft.integrations.trainer import NAME
from layerpeft.model.layers import base_of
from layerpeft.recipe import train as training
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import load_model, make_trainer, prepare, training_arguments
from tests.conftest import LLAMA
from tests.helpers.quanting import logits, wide, wrap
from tests.helpers.repeating import repeated
from tests.helpers.training import plain

pytest.importorskip("bitsandbytes")
pytest.importorskip("hqq")
METHODS = {"lora": LayerLoraConfig, "galore": LayerGaloreConfig, "full": LayerFullConfig}


def small(dtype):
    """Two layers, and the words of the tokenizer that tests have."""
    return wide(dtype, vocab_size=4096, num_hidden_layers=2)


@pytest.fixture
def recipe(tmp_path):
    """Made of a two-layer Llama in a dtype, and 8 rows; nothing is measured, and the learning rate is that of large models."""
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f" That is {2 * i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(tmp_path / "base")

    def made(method, dtype, **block):
        small(dtype).save_pretrained(tmp_path / "base")
        lines = {"trainer": "sft", "model_name_or_path": str(tmp_path / "base"), "learning_rate": 2e-5, "max_steps": 2}
        lines |= {"dataset_name": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out"), "use_cpu": True}
        lines |= {"per_device_train_batch_size": 2, "max_length": 32, "sample_tokens": 0, "logging_steps": 1}
        (tmp_path / "r.yaml").write_text(json.dumps({**lines, "layerpeft": {"method": method, "select": [1], **block}}))
        return load_recipe(str(tmp_path / "r.yaml"))

    return made


def trained_by(door, recipe, config):
    """(trained tensors by name, the model) of the recipe's run by one door."""
    if door == "recipe":
        held = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "make_trainer", lambda *a, **k: held.append(make_trainer(*a, **k)) or held[-1])
            training.run(recipe, lambda _: None)
        return found_in(held[-1].model)
    setup = prepare(recipe)
    arguments = training_arguments(recipe)
    model = load_model(setup)
    set_seed(arguments.seed)
    if door == "get_peft_model":
        model = get_peft_model(model, config)
    if door == "add_adapter":
        model.add_adapter(config)
    given = {"peft_config": config} if door == "peft_config" else {}
    trainer = SFTTrainer(model, args=arguments, train_dataset=setup.train, processing_class=setup.tokenizer, **given)
    set_seed(arguments.seed)
    trainer.train()
    return found_in(trainer.model)


def found_in(model):
    return {plain(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}


REST = [("lora", "nf4"), ("full", 3), ("lora", 2), ("galore", "nf4"), ("full", "nf4")]
CASES = [("galore", "int8"), *map(repeated, REST)]


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_every_door_trains_the_same_elements_to_the_same_values(recipe, method, precision):
    rank = {} if method == "full" else {"r": 4}
    made = recipe(method, torch.float32 if method == "full" else torch.bfloat16, quantize_frozen=precision, **rank)
    config = METHODS[method](select=[1], quantize_frozen=precision, task_type="CAUSAL_LM", **rank)
    doors = ["recipe", "get_peft_model", "peft_config"] + ["add_adapter"] * (method == "lora")
    first, *others = (trained_by(door, made, config) for door in doors)
    assert first and {p.dtype for p in first.values()} == {torch.float32}, "nothing was cast"
    start = AutoModelForCausalLM.from_pretrained(made["model_name_or_path"], dtype=torch.float32).state_dict()
    for name, tensor in first.items():
        before = start.get(name, torch.zeros_like(tensor))
        assert (tensor != before).float().mean() > 0.99, f"{name}: an element that moved by less than 16 bits show"
    for door, other in zip(doors[1:], others, strict=True):
        assert other.keys() == first.keys(), door
        assert all(torch.equal(first[n], p) for n, p in other.items()), door


def precisions_of(model):
    return {plain(n): p.dtype for n, p in model.named_parameters()}


@pytest.fixture
def arguments(tmp_path):
    """Those of a trainer, rows with an answer or with two, and a tokenizer."""
    options = {"report_to": [], "use_cpu": True, "max_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True}

    def made(kind, bf16=True):
        given = kind(str(tmp_path), per_device_train_batch_size=2, bf16=bf16, **options)
        answers = {"completion": " Four."} if kind is SFTConfig else {"chosen": " Four.", "rejected": " A fish."}
        rows = Dataset.from_list([{"prompt": "Two and two?", **answers}] * 4)
        return {"args": given, "train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(LLAMA)}

    return made


@pytest.mark.spread(3)
@pytest.mark.parametrize("method", METHODS)
def test_no_trainer_takes_a_packed_base_for_one_whose_adapters_are_to_be_cast(arguments, method):
    rank = {} if method == "full" else {"r": 4}
    config = METHODS[method](select=[1], quantize_frozen="nf4", task_type="CAUSAL_LM", **rank)
    for dtype in (torch.float16, torch.float32):
        want = precisions_of(get_peft_model(small(dtype), config))
        assert torch.bfloat16 not in want.values()
        # what OnlineDPO, SDFT, SDPO and others prepare a model by, and what ORPO and CPO do themselves
        args = arguments(SFTConfig)["args"]
        assert precisions_of(prepare_peft_model(get_peft_model(small(dtype), config), None, args)) == want
        assert precisions_of(prepare_peft_model(small(dtype), config, args)) == want
        assert precisions_of(ORPOTrainer(small(dtype), peft_config=config, **arguments(ORPOConfig)).model) == want


def test_a_base_that_was_packed_first_is_marked_until_an_adapter_is_on_it(arguments):
    def packed():
        model = small(torch.float16)
        quantize(model, {"select": "all", "bits": "nf4"})
        assert model.is_loaded_in_4bit
        return model

    stock = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ours = LayerLoraConfig(select=[1], r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    given = arguments(SFTConfig)
    for config in (stock, ours):
        wrapped = SFTTrainer(get_peft_model(packed(), config), **given).model
        inside = SFTTrainer(packed(), peft_config=config, **given).model
        for model in (wrapped, inside):
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            assert not hasattr(base_of(model), "is_loaded_in_4bit")
    model = get_peft_model(packed(), ours)
    for other in (copy.deepcopy(model), model):  # PEFT still knows what it wraps
        other.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"]))
        assert type(base_of(other).model.layers[0].self_attn.v_proj).__name__ == "Linear4bit"
    assert not hasattr(base_of(model), "is_loaded_in_4bit")


def test_the_reference_of_preference_training_is_the_packed_base_to_the_bit(arguments):
    packed = small(torch.float32)
    quantize(packed, {"select": [0], "bits": "nf4"})
    want = logits(packed)
    for method, kind in METHODS.items():
        rank = {} if method == "full" else {"r": 4}
        config = kind(select=[1], quantize_frozen="nf4", task_type="CAUSAL_LM", **rank)
        trainer = DPOTrainer(small(torch.float32), peft_config=config, **arguments(DPOConfig, bf16=False))
        trainer.train()
        assert not torch.equal(logits(trainer.model), want)
        with trainer.model.disable_adapter():
            assert torch.equal(logits(trainer.model), want), method


def test_packed_layers_are_kept_from_data_parallel(tmp_path):
    """Which transformers does by the marks that it sets itself."""
    watching = next(c for c in DEFAULT_CALLBACKS if c.__name__ == NAME)()
    for model, left in ((wrap(quantize_frozen="nf4"), 1), (wrap(), 2)):
        args = SimpleNamespace(n_gpu=2, _n_gpu=2)
        watching.on_init_end(args, None, None, model=model)
        assert args._n_gpu == left
