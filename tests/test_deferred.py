"""A choice that waits for the first optimizer step of a loop of one's own."""

from __future__ import annotations

import copy
import gc
import io
import logging
import re
import weakref

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, score_layers
from layerpeft.errors import ConfigError, TrainingError
from tests.models import MODELS

BY_GRADIENT = {"by": "gradient_norm", "keep": 2}
BY_OUTLIERS = {"by": "outliers", "keep": 2, "M": 2.0}
LAYERS = 4


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 64, "num_hidden_layers": LAYERS, **options}
    return LlamaForCausalLM(LlamaConfig(**sizes)).train()


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 64, (2, 12), generator=draw) for _ in range(8)]
    return [{"input_ids": x, "labels": x} for x in ids]


def wrap(select=BY_GRADIENT, model=None, **options):
    base = llama() if model is None else model
    return layerpeft.get_peft_model(base, LayerLoraConfig(select=select, r=4, task_type="CAUSAL_LM", **options))


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, **options)


def step(model, optimizer, *batches, drop=True):
    for batch in batches:
        model(**batch).loss.backward()
    optimizer.step()
    if drop:
        optimizer.zero_grad()


def record(model):
    return model.peft_config["default"]._layerpeft


def chosen(model):
    selection = record(model).selection
    return None if selection is None else selection.layers


def loras(model):
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def layers_of(names):
    return {int(n.split(".layers.")[1].split(".")[0]) for n in names}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, k)) for m in model.modules() for k in kinds)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("select", [BY_GRADIENT, BY_OUTLIERS], ids=["gradient_norm", "outliers"])
def test_autocast(batches, select, dtype):
    model = wrap(select)
    optimizer = adamw(model)
    for batch in batches[:2]:
        with torch.autocast("cpu", dtype):
            loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    options = {k: v for k, v in select.items() if k not in ("by", "keep")}
    with torch.autocast("cpu", dtype):
        scores = score_layers(llama(), select["by"], batches=batches[:2], num_batches=2, progress=False, **options)
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-3)
    assert chosen(model) == tuple(sorted(scores.ranked()[:2]))


def test_models_with_dropout(batches):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    base = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    twin = copy.deepcopy(base)
    model = layerpeft.get_peft_model(
        base, LayerLoraConfig(select=BY_GRADIENT, r=4, lora_dropout=0.3, fan_in_fan_out=True)
    )
    optimizer = adamw(model)
    for seed in (3, 4, 5):
        torch.manual_seed(seed)
        step(model, optimizer, batches[0])
    check_trained(model)
    assert len(chosen(model)) == 2 and record(model).steps_trained == dict.fromkeys(chosen(model), 3)
    # measured under dropout, as training computes: not the numbers of evaluation mode
    still = score_layers(twin, batches=batches[:1], num_batches=1, progress=False)
    assert record(model).selection.scores.values != pytest.approx(still.values, rel=1e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_loss_scaler_skips_is_not_scored(batches, fused):
    model = wrap()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)

    def scaled(*given, spoil=False):
        for batch in given:
            scaler.scale(model(**batch).loss).backward()
        if spoil:
            next(iter(loras(model).values())).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    before = {n: p.detach().clone() for n, p in loras(model).items()}
    scaled(*batches[4:6], spoil=True)
    assert chosen(model) is None and all(torch.equal(p, before[n]) for n, p in loras(model).items())
    scaled(*batches[:2])
    scores = score_layers(llama(), batches=batches[:2], num_batches=2, progress=False)
    found = record(model).selection
    assert found.scores.origin["num_batches"] == 2
    scale = found.scores.values[0] / scores.values[0]
    assert scale == pytest.approx(2.0, rel=1e-4)  # the loss scale of that step, which ranks nothing
    assert found.scores.values == pytest.approx([scale * v for v in scores.values], rel=1e-4)
    scaled(batches[2], spoil=True)
    scaled(batches[3])
    check_trained(model)
    assert record(model).steps_trained == dict.fromkeys(chosen(model), 2)


def test_gradients_dropped_by_hand_are_not_scored(batches):
    for to_none in (True, False):
        model = wrap()
        optimizer = adamw(model)
        model(**batches[5]).loss.backward()
        optimizer.zero_grad(set_to_none=to_none)
        step(model, optimizer, batches[0])
        scores = score_layers(llama(), batches=batches[:1], num_batches=1, progress=False)
        assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)


@pytest.mark.parametrize(
    "split", [("lora_A", "lora_B"), (r"layers\.[01]\.", r"layers\.[23]\.")], ids=["matrices", "layers"]
)
def test_two_optimizers(batches, split):
    model = wrap()
    parts = [[p for n, p in loras(model).items() if re.search(mark, n)] for mark in split]
    assert sum(map(len, parts)) == len(loras(model))
    optimizers = [torch.optim.AdamW(p, 1e-2) for p in parts]
    for batch in batches[:3]:
        model(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            if optimizer is optimizers[0]:
                held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
                assert held == {id(p) for p in loras(model).values()}
        for optimizer in optimizers:
            optimizer.zero_grad()
    check_trained(model)
    assert record(model).checks["first_step"] == "every chosen target moved"
    assert record(model).steps_trained == dict.fromkeys(chosen(model), 3)


def test_gradient_checkpointing_counts_nothing_twice(batches):
    for reentrant in (False, True):
        for select in (BY_GRADIENT, BY_OUTLIERS):
            model = wrap(select)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            step(model, adamw(model), *batches[:2])
            options = {k: v for k, v in select.items() if k not in ("by", "keep")}
            scores = score_layers(llama(), select["by"], batches=batches[:2], num_batches=2, progress=False, **options)
            assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models(batches, in_place):
    model = wrap({**BY_GRADIENT, "keep": 1}, llama(num_hidden_layers=2))
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    optimizer = adamw(model)
    losses = []
    for batch in batches[:3]:
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    eager = wrap({**BY_GRADIENT, "keep": 1}, llama(num_hidden_layers=2))
    other = adamw(eager)
    for batch, loss in zip(batches[:3], losses, strict=True):
        found = eager(**batch).loss
        found.backward()
        other.step()
        other.zero_grad()
        assert loss == pytest.approx(float(found.detach()), rel=1e-6)
    assert record(model).selection == record(eager).selection
    assert all(torch.allclose(p, loras(eager)[n], atol=1e-6) for n, p in loras(model).items())
    check_trained(compiled)


def test_a_deep_copy_measures_for_itself_and_leaves_the_original_alone(batches):
    model = wrap()
    model(**batches[0]).loss.backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin(**batches[3])
    steps = adamw(twin)
    twin.zero_grad()
    step(twin, steps, *batches[4:6])
    assert chosen(model) is None and chosen(twin) is not None
    theirs = score_layers(llama(), batches=batches[4:6], num_batches=2, progress=False)
    assert record(twin).selection.scores.values == pytest.approx(theirs.values, rel=1e-5)
    assert layers_of(loras(twin)) == set(chosen(twin)) and hooks(twin) == hooks(wrap(list(chosen(twin))))
    assert layers_of(loras(model)) == set(range(LAYERS))
    step(model, adamw(model), batches[1])
    ours = score_layers(llama(), batches=batches[:2], num_batches=2, progress=False)
    assert record(model).selection.scores.values == pytest.approx(ours.values, rel=1e-5)
    check_trained(model)
    check_trained(twin)


def test_a_deep_copy_made_after_the_choice_is_followed_too(batches):
    model = wrap()
    step(model, adamw(model), batches[0])
    twin = copy.deepcopy(model)
    optimizer = adamw(twin)
    step(twin, optimizer, batches[1])
    assert record(model).steps_trained == dict.fromkeys(chosen(model), 1)
    assert record(twin).steps_trained == dict.fromkeys(chosen(model), 2)
    with torch.no_grad():
        twin.get_input_embeddings().weight[0, 0] += 1e-6
    check_trained(model)
    with pytest.raises(TrainingError, match="embed_tokens.weight is frozen and changed"):
        check_trained(twin)


def test_a_trained_model_can_be_pickled_and_is_freed(batches):
    model = wrap()
    step(model, adamw(model), batches[0])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    model.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batches[1]).logits, model(**batches[1]).logits)
    gone = weakref.ref(model.base_model.model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None  # at once, as a stock PEFT model is, and not when the collector comes by
    finally:
        gc.enable()


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
