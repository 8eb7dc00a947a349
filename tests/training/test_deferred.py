"""A choice that waits for the first optimizer step of a loop of one's own."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, score_layers
from layerpeft.errors import ConfigError, TrainingError
from tests.helpers.loops import (
    BY_GRADIENT,
    BY_OUTLIERS,
    LAYERS,
    adamw,
    chosen,
    hooks,
    layers_of,
    llama,
    loras,
    make_batches,
    record,
    step,
    wrap,
)
from tests.helpers.models import MODELS


@pytest.fixture(scope="module")
def batches():
    return make_batches()


@pytest.mark.matrix
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "select", [BY_GRADIENT, {**BY_GRADIENT, "exact": True}, BY_OUTLIERS], ids=["probe", "exact", "outliers"]
)
def test_the_choice_is_that_of_score_layers_on_the_same_batches(batches, select, count):
    model = wrap(select)
    step(model, adamw(model), *batches[:count])
    options = {k: v for k, v in select.items() if k not in ("by", "keep")}
    scores = score_layers(llama(), select["by"], batches=batches[:count], num_batches=count, progress=False, **options)
    assert chosen(model) == tuple(sorted(scores.ranked()[:2]))
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)
    assert record(model).selection.scores.origin == scores.origin
    check_trained(model)


def test_the_probe_changes_no_bit_of_a_step(batches):
    measured = wrap()
    first = {n: p.detach().clone() for n, p in loras(measured).items()}
    optimizer = adamw(measured)
    for batch in batches[:2]:
        measured(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in loras(measured).items()}
    optimizer.step()

    fixed = wrap(list(chosen(measured)))
    with torch.no_grad():
        for name, parameter in loras(fixed).items():
            parameter.copy_(first[name])
    other = adamw(fixed)
    for batch in batches[:2]:
        fixed(**batch).loss.backward()
    assert set(loras(fixed)) == set(loras(measured)) < set(first)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in loras(fixed).items())
    ours = torch.nn.utils.get_total_norm([p.grad for p in loras(fixed).values()])
    theirs = torch.nn.utils.get_total_norm([gradients[n] for n in loras(fixed)])
    assert torch.equal(ours, theirs) and ours > 0
    other.step()
    assert all(torch.equal(p, loras(measured)[n]) for n, p in loras(fixed).items())


def test_the_probe_is_in_no_state_no_parameter_and_no_optimizer(batches):
    model = wrap()
    stock = peft.get_peft_model(llama(), peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    model(**batches[0]).loss.backward()
    assert hooks(model) > hooks(stock)  # measuring is on
    assert set(model.state_dict()) == set(stock.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in stock.named_buffers()]
    assert model.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(loras(model))


def test_unchosen_wrappers_and_all_hooks_are_gone_after_the_choice(batches):
    model = wrap()
    assert layers_of(loras(model)) == set(range(LAYERS))
    optimizer = adamw(model)
    step(model, optimizer, batches[0])
    stock = wrap(list(chosen(model)))
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert hooks(model) == hooks(stock)
    assert {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert model.base_model.targeted_module_names == stock.base_model.targeted_module_names
    assert model.peft_config["default"].target_modules == stock.peft_config["default"].target_modules
    assert model.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()


def test_the_optimizer_holds_exactly_the_chosen_tensors(batches):
    model = wrap()
    names = {id(p): n for n, p in model.named_parameters()}
    halves = [[p for n, p in loras(model).items() if mark in n] for mark in ("lora_A", "lora_B")]
    optimizer = torch.optim.AdamW(
        [{"params": halves[0], "lr": 1e-2}, {"params": halves[1], "lr": 2e-2}], weight_decay=0.1
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    rates = []
    for batch in batches[:3]:
        rates.append([g["lr"] for g in optimizer.param_groups])
        step(model, optimizer, batch)
        scheduler.step()
    assert rates == [[1e-2 * (1 / n), 2e-2 * (1 / n)] for n in (1, 2, 3)]
    assert [{names[id(p)] for p in g["params"]} for g in optimizer.param_groups] == [
        {n for n in loras(model) if mark in n} for mark in ("lora_A", "lora_B")
    ]
    assert {id(p) for p in optimizer.state} == {id(p) for p in loras(model).values()}
    assert all(s["step"] == 3 for s in optimizer.state.values())
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_optimizer_that_makes_its_state_beforehand_loses_that_of_the_unchosen(batches):
    model = wrap()
    optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], 1e-2)
    assert len(optimizer.state) == len(loras(model))
    step(model, optimizer, batches[0])
    assert {id(p) for p in optimizer.state} == {id(p) for p in loras(model).values()}
    check_trained(model)


def test_measuring_steps_change_nothing_and_are_named(batches, caplog):
    model = wrap({**BY_GRADIENT, "num_batches": 5})
    optimizer = adamw(model, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with caplog.at_level(logging.INFO, logger="layerpeft"):
        for i in range(2):
            step(model, optimizer, *batches[2 * i : 2 * i + 2])
            assert chosen(model) is None and not optimizer.state
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        step(model, optimizer, *batches[4:6])
    texts = [r.getMessage() for r in caplog.records]
    assert [t for t in texts if "measures" in t] == [
        "optimizer step 1 only measures (2 of 5 batches); no layer changes",
        "optimizer step 2 only measures (4 of 5 batches); no layer changes",
    ]
    assert any("chosen before the first update" in t for t in texts)
    scores = score_layers(llama(), batches=batches[:6], num_batches=6, progress=False)
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)
    assert any(not torch.equal(p, before[n]) for n, p in loras(model).items())
    assert record(model).steps_trained == dict.fromkeys(chosen(model), 1)


def test_ending_before_the_choice_is_an_error(batches):
    model = wrap({**BY_GRADIENT, "num_batches": 5})
    step(model, adamw(model), *batches[:2])
    with pytest.raises(TrainingError, match="before the layers were chosen: 2 of 5 batches came"):
        check_trained(model)


def test_options_that_cannot_wait_are_refused_together():
    with pytest.raises(ConfigError) as error:
        wrap(init_lora_weights="pissa", bias="all")
    text = str(error.value)
    assert "init_lora_weights='pissa'" in text and "bias='all'" in text and "batches=" in text
    config = LayerLoraConfig(select=BY_GRADIENT, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ConfigError, match="target_parameters"):
        layerpeft.get_peft_model(MODELS["mixtral"](), config)
    for init in ("pissa", "olora", "eva", False):
        with pytest.raises(ConfigError, match="init_lora_weights"):
            wrap(init_lora_weights=init)


def test_forward_passes_of_evaluation_do_not_count(batches):
    model = wrap()
    optimizer = adamw(model)
    model.eval()
    with torch.no_grad():
        model(**batches[5])
    model.train()
    loss = model(**batches[0]).loss
    with torch.no_grad():
        model(**batches[6])  # between forward and backward
    loss.backward()
    with torch.no_grad():
        model(**batches[7])
    step(model, optimizer, batches[1])
    scores = score_layers(llama(), batches=batches[:2], num_batches=2, progress=False)
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)
    assert record(model).selection.scores.origin["num_batches"] == 2


def test_several_forward_passes_before_one_backward_pass_are_one_batch(batches):
    model = wrap({**BY_GRADIENT, "exact": True})
    (model(**batches[0]).loss + model(**batches[1]).loss).backward()
    adamw(model).step()
    pair = {"input_ids": torch.cat([b["input_ids"] for b in batches[:2]])}
    together = score_layers(
        llama(), batches=[pair | {"labels": pair["input_ids"]}], exact=True, num_batches=1, progress=False
    )
    assert record(model).selection.scores.values == pytest.approx([2 * v for v in together.values], rel=1e-4)


def test_what_never_reaches_the_model_is_named(batches):
    model = wrap()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(TrainingError, match="has seen no batch.*closure.*batches="):
        optimizer.step(lambda: model(**batches[0]).loss)
    model = wrap(BY_OUTLIERS).eval()
    with pytest.raises(TrainingError, match="evaluation mode"):
        step(model, adamw(model), batches[0])


def test_a_loop_in_evaluation_mode_is_measured_all_the_same(batches):
    model = wrap().eval()
    step(model, adamw(model), *batches[:2])
    scores = score_layers(llama(), batches=batches[:2], num_batches=2, progress=False)
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)


def test_an_optimizer_of_another_model_changes_nothing(batches):
    model = wrap()
    model(**batches[0]).loss.backward()
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert chosen(model) is None
    adamw(model).step()
    assert len(chosen(model)) == 2


def test_an_adapter_loaded_while_the_choice_waits_settles_it(batches, tmp_path):
    first = wrap()
    step(first, adamw(first), batches[0])
    first.save_pretrained(tmp_path)
    second = wrap()
    second.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert layers_of(loras(second)) == set(chosen(first)) == set(chosen(second))
    assert all(torch.equal(p, loras(first)[n]) for n, p in loras(second).items())
    assert hooks(second) == hooks(first) and record(second).selection.why == "kept from the adapter that was loaded"
    step(second, adamw(second), batches[1])
    check_trained(second)
