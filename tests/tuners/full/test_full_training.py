"""Full training through trainers and loops: it is that of a plain model whose other layers are frozen, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerpeft
from layerpeft import LayerFullConfig
from layerpeft.errors import SelectionError, TrainingError
from layerpeft.tuners.full.layer import full_layers, saved_modules
from tests.helpers.fulling import BATCHES, by_hand, clean, differ, parameters, same, train, trains, unloaded, wrap
from tests.helpers.loops import BY_GRADIENT, BY_OUTLIERS, adamw, llama, step
from tests.helpers.short import short_llama
from tests.helpers.training import BY_GRADIENT as THREE
from tests.helpers.training import chosen, gsm8k_rows, record, sft

LAYERS = 4


@pytest.fixture(scope="module")
def rows():
    return gsm8k_rows()


def base():
    return AutoModelForCausalLM.from_pretrained(short_llama(LAYERS), dtype=torch.float32)


def plain_sft(rows, folder, layers, **options):
    model = base()
    inside = tuple(f"model.layers.{i}." for i in layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(inside))
    return sft(rows, folder, None, model=model, **options)


OPTIONS = {"max_steps": 2, "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


def test_sft_on_named_layers_is_plain_sft_with_the_others_frozen(rows, tmp_path):
    ours = sft(rows, tmp_path / "a", LayerFullConfig(select=[1, 3]), model=base(), **OPTIONS)
    ours.train()
    theirs = plain_sft(rows, tmp_path / "b", [1, 3], **OPTIONS)
    theirs.train()
    assert same(parameters(ours.model), parameters(theirs.model))
    assert differ(parameters(base()), parameters(ours.model)) == trains(ours.model) != set()
    losses = [[(e["loss"], e["grad_norm"]) for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert losses[0] == losses[1]
    assert record(ours).checks["end"].startswith("every chosen target moved")
    assert record(ours).steps_trained == {1: 2, 3: 2}


def test_a_choice_that_waits_for_the_first_step_trains_as_if_it_had_been_known(rows, tmp_path):
    ours = sft(rows, tmp_path / "a", LayerFullConfig(select=THREE), model=base(), **OPTIONS)
    assert len(trains(ours.model)) == LAYERS * 9
    ours.train()
    layers = chosen(ours)
    assert len(layers) == 3 and {int(n.split(".")[2]) for n in trains(ours.model)} == set(layers)
    theirs = plain_sft(rows, tmp_path / "b", layers, **OPTIONS)
    theirs.train()
    assert same(parameters(ours.model), parameters(theirs.model))
    assert set(saved_modules(ours.model, "default")) == set(record(ours).selection.targets)
    ours.model.save_pretrained(tmp_path / "saved")
    loaded = layerpeft.load(tmp_path / "saved", base())
    assert same(parameters(loaded), parameters(ours.model))


@pytest.mark.parametrize("select", [BY_GRADIENT, BY_OUTLIERS])
def test_a_loop_of_ones_own_waits_as_well(select):
    model = wrap(select=select)
    train(model, 4)
    layers = record_of(model).selection.layers
    assert len(layers) == 2 and {int(n.split(".")[2]) for n in trains(model)} == set(layers)
    assert same(parameters(model), parameters(by_hand(layers)))
    assert same(unloaded(model), parameters(llama()))
    layerpeft.check_trained(model)


def record_of(model):
    return model.peft_config["default"]._layerpeft


def resumable(rows, folder, select, **options):
    options = {**OPTIONS, "max_steps": 2, "save_steps": 1, **options}
    return sft(rows, folder, LayerFullConfig(select=select), model=base(), **options)


@pytest.mark.spread(2)
@pytest.mark.parametrize("select", [[1, 3], THREE], ids=["by place", "by gradients"])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(select, rows, tmp_path):
    whole = resumable(rows, tmp_path / "a", select)
    whole.train()
    torch.manual_seed(5)
    again = resumable(rows, tmp_path / "b", select)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert same(parameters(again.model), parameters(whole.model))
    assert record(again).selection == record(whole).selection
    assert record(again).steps_trained == record(whole).steps_trained
    assert same(unloaded(again.model), parameters(base()))
    layers = record(whole).selection.layers
    other = resumable(rows, tmp_path / "c", [min(set(range(LAYERS)) - set(layers)), layers[-1]])
    with pytest.raises(SelectionError, match="other targets|another way"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


@pytest.mark.parametrize("maker", ["adamw", "sgd"])
def test_masters_make_a_16_bit_run_one_in_float32_that_rounds_for_the_passes(maker):
    makers = {"adamw": lambda p: torch.optim.AdamW(p, 1e-3), "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)}
    model = wrap(llama().bfloat16(), select=[1, 3], master_weights=True)
    hand = llama().bfloat16()
    names = trains(model)
    for name, parameter in hand.named_parameters():
        parameter.requires_grad_(name in names)
    held = {n: p for n, p in hand.named_parameters() if p.requires_grad}
    copies = {n: torch.nn.Parameter(p.detach().float()) for n, p in held.items()}
    ours = makers[maker]([p for p in model.parameters() if p.requires_grad])
    theirs = makers[maker]([copies[clean(n)] for n, p in model.named_parameters() if p.requires_grad])
    for batch in BATCHES[:5]:
        step(model, ours, batch)
        hand(**batch).loss.backward()
        for name, parameter in held.items():
            copies[name].grad = parameter.grad.float()
            parameter.grad = None
        theirs.step()
        for name, parameter in held.items():
            parameter.data.copy_(copies[name])
        assert same(parameters(model), parameters(hand))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_what_does_not_train_is_found():
    model = wrap(select=[1, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad][1:], 1e-2)
    with pytest.raises(TrainingError, match="not in the optimizer"):
        step(model, optimizer, BATCHES[0])
    model = wrap(select=[1, 3])
    optimizer = adamw(model)
    step(model, optimizer, BATCHES[0])
    full_layers(model, "default")["model.layers.3.mlp.up_proj"].weight.data.copy_(
        llama().model.layers[3].mlp.up_proj.weight
    )
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(TrainingError) as caught:
        layerpeft.check_trained(model)
    assert "model.layers.0.mlp.up_proj.weight is frozen and changed" in str(caught.value)
    assert "model.layers.3.mlp.up_proj did not move" in str(caught.value)


def test_dpo_without_a_reference_model_takes_the_base_and_trains_as_with_one(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list(
        [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": f" I do not know {i}."} for i in range(8)]
    )
    found = []
    for with_reference in (False, True):
        args = DPOConfig(
            str(tmp_path / str(with_reference)), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-3, report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, seed=0, logging_steps=1,
        )  # fmt: skip
        model = base()
        if with_reference:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(f".layers.{LAYERS - 1}." in name)
        trainer = DPOTrainer(
            model,
            ref_model=base() if with_reference else None,
            args=args,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(short_llama(LAYERS)),
            peft_config=None if with_reference else LayerFullConfig(select="last:1"),
        )
        trainer.train()
        found.append(parameters(trainer.model))
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert len(losses) == 3 and losses[-1] < losses[0]
    assert same(*found)
    assert differ(parameters(base()), found[0]) == {n for n in found[0] if f".layers.{LAYERS - 1}." in n}
