"""A choice that waits, in all kinds of loops: autocast, dropout, scalers, several optimizers, compiled and copied models."""

from __future__ import annotations

import copy
import gc
import io
import re
import weakref

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, score_layers
from layerpeft.errors import TrainingError
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
from tests.helpers.repeating import repeated


@pytest.fixture(scope="module")
def batches():
    return make_batches()


@pytest.mark.matrix
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
    assert found.scores.values == pytest.approx(scores.values, rel=1e-4)  # without the loss scale of that step
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


@pytest.mark.parametrize("in_place", [repeated(False), True])
def test_compiled_models(batches, in_place):
    options = {"select": {**BY_GRADIENT, "keep": 1}, "target_modules": ["c_attn", "c_fc"], "task_type": None}
    torch.manual_seed(0)
    model = wrap(model=MODELS["nanogpt"](), **options)
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    optimizer = adamw(model)
    losses = []
    for batch in batches[:2]:
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    torch.manual_seed(0)
    eager = wrap(model=MODELS["nanogpt"](), **options)
    other = adamw(eager)
    for batch, loss in zip(batches[:2], losses, strict=True):
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
