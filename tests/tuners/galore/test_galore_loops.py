"""Projection in loops of one's own: accumulation, clipping, scaling, skipped and dropped steps, several optimizers, schedules."""

from __future__ import annotations

import pytest
import torch

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.errors import LayerpeftError
from layerpeft.tuners.galore.projection import state_of
from tests.helpers.loops import adamw, llama, make_batches
from tests.helpers.models import MODELS
from tests.helpers.projecting import (
    BATCHES,
    TARGETS,
    apart,
    gradients,
    logits,
    modules,
    refreshes,
    same,
    snapshot,
    train,
    trained,
    weights,
    wrap,
)
from tests.helpers.repeating import some

KINDS = ["sketch", "svd", "random"]
EXACT = ["sketch", "svd"]


@pytest.fixture(scope="module")
def plain():
    """Subspace -> an undisturbed run of eight steps."""
    return {kind: train(wrap(subspace=kind)) for kind in KINDS}


def run(body, kind="sketch", steps=8, **options):
    """A run of `body(model, optimizer, batch)`."""
    model = wrap(subspace=kind, **options)
    optimizer = adamw(model)
    for number in range(steps):
        body(model, optimizer, BATCHES[number % 8])
    return model


def backward(model, batch, factor=1.0):
    (factor * model(**batch).loss).backward()


# must show: tokens are tokens, however they come


def accumulated(parts, dtype, kind, steps=15, tokens=96):
    """Eight sequences a step, in so many parts."""
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 64, (8, tokens // 8), generator=draw) for _ in range(6)]
    config = LayerGaloreConfig(select=[1, 3], r=4, update_proj_gap=3, target_modules=TARGETS, subspace=kind)
    model = layerpeft.get_peft_model(llama().to(dtype), config).train()
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    for number in range(steps):
        for part in ids[number % 6].chunk(parts):
            (model(input_ids=part, labels=part).loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert all(r >= 5 for r, _, _ in refreshes(model))
    start = {n: p.detach() for n, p in llama().to(dtype).named_parameters()}
    return weights(model), start


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, None), (torch.float32, 1e-2)])
def test_four_micro_batches_equal_one_of_four_times_the_size(kind, dtype, most):
    (whole, start), (parts, _) = (accumulated(n, dtype, kind) for n in (1, 4))
    movement = apart(whole, start)
    assert movement > 1e-2
    difference = apart(parts, whole)
    print(f"{kind}, {dtype}: {difference:.1e} apart, {difference / movement:.1e} of the movement")
    assert difference <= (1e-7 if most is None else most * movement)


# what stands between forward and step


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(plain, kind, reentrant):
    model = wrap(subspace=kind)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    train(model)
    assert same(snapshot(model), snapshot(plain[kind]))


@pytest.mark.parametrize("kind", some(EXACT, 1))
def test_compiled(kind):
    torch.compiler.reset()
    made = []

    def backend(graph, _):
        made.append(1)
        return graph.forward

    options = {"update_proj_gap": 2, "target_modules": ["c_attn", "c_fc"], "task_type": None, "subspace": kind}
    model, twin = (wrap(MODELS["nanogpt"](), (1,), **options) for _ in range(2))
    compiled, optimizer, counts = torch.compile(model, backend=backend), adamw(model), []
    for number in range(7):
        train(compiled, 1, optimizer=optimizer, start=number)
        counts.append(len(made))
    train(twin, 7)
    torch.compiler.reset()
    assert counts[-1] == counts[4] > 1  # compiling has an end: all places of the period have been seen twice
    assert refreshes(model) == refreshes(twin) and min(r for r, _, _ in refreshes(model)) >= 3
    assert apart(weights(model), weights(twin)) < 1e-6


@pytest.mark.spread(3)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(plain, kind):
    def body(model, optimizer, batch):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = run(body, kind)
    assert refreshes(model) == refreshes(plain[kind])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours, theirs = weights(model), weights(plain[kind])
    start = {n: p.detach() for n, p in llama().named_parameters()}
    assert 0 < apart(ours, theirs) < apart(theirs, start)
    for a, b in zip(gradients(model).values(), gradients(plain[kind]).values(), strict=True):
        assert float((a - b).norm()) < 0.2 * float(b.norm()) or kind != "random"


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_changes_nothing(plain, kind, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def body(model, optimizer, batch):
        scaler.scale(model(**batch).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    model = wrap(subspace=kind)
    optimizer = adamw(model, fused=fused or None)
    for batch in BATCHES:
        body(model, optimizer, batch)
    assert refreshes(model) == refreshes(plain[kind])
    assert apart(weights(model), weights(plain[kind])) < 1e-6


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", EXACT)
def test_steps_that_a_loss_scaler_skips_leave_no_trace(plain, kind, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    model = wrap(subspace=kind)
    optimizer, counts = adamw(model, fused=fused or None), []
    for number, batch in enumerate(BATCHES):
        for bad in ([True] if number in (0, 2, 3, 4, 6) else []) + [False]:
            scaler.scale(model(**(BATCHES[(number + 3) % 8] if bad else batch)).loss).backward()
            if bad:
                trained(model)[-1].grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update(8.0)
            optimizer.zero_grad()
        counts.append({s for _, _, s in refreshes(model)})
    assert counts == [{n + 1} for n in range(8)]  # a skipped step is none
    assert apart(weights(model), weights(plain[kind])) < 1e-6


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_dropped_leave_no_trace(plain, kind, to_none):
    def body(model, optimizer, batch):
        backward(model, BATCHES[5], 50.0)
        optimizer.zero_grad(set_to_none=to_none)  # a batch that a loop throws away
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)

    assert same(snapshot(run(body, kind)), snapshot(plain[kind]))


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["zeros", "the model's"])
def test_ways_to_zero_gradients(plain, kind, how):
    def body(model, optimizer, batch):
        backward(model, batch)
        optimizer.step()
        model.zero_grad() if how == "the model's" else optimizer.zero_grad(set_to_none=False)

    assert same(snapshot(run(body, kind)), snapshot(plain[kind]))


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", EXACT)
def test_evaluation_in_between_leaves_no_trace(plain, kind):
    def body(model, optimizer, batch):
        with torch.no_grad():
            model(**BATCHES[5])
        model.eval()
        model(**BATCHES[5]).loss.backward()  # a saliency map, say
        optimizer.zero_grad()
        model.train()
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    assert same(snapshot(run(body, kind)), snapshot(plain[kind]))


# optimizers and schedules


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", KINDS)
def test_closures(plain, kind):
    def body(model, optimizer, batch):
        def closure():
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        optimizer.step(closure)

    try:
        model = run(body, kind)
    except LayerpeftError as error:
        assert kind == "svd" and "closure" in str(error)
        return
    assert same(snapshot(model), snapshot(plain[kind]))


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("stagger", [True, False])
def test_two_optimizers_equal_one(kind, stagger):
    whole = train(wrap(subspace=kind, stagger=stagger))
    model = wrap(subspace=kind, stagger=stagger)
    held = trained(model)
    optimizers = [torch.optim.AdamW(held[:3], 1e-2), torch.optim.AdamW(held[3:], 1e-2)]
    for batch in BATCHES:
        backward(model, batch)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert refreshes(model) == refreshes(whole)
    assert same(snapshot(model), snapshot(whole))


def test_two_random_optimizers_equal_one(plain):
    model = wrap(subspace="random")
    optimizers = [torch.optim.AdamW([p], 1e-2) for p in trained(model)]
    for batch in BATCHES:
        backward(model, batch)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert same(snapshot(model), snapshot(plain["random"]))


def test_an_optimizer_of_something_else_changes_nothing(plain):
    stranger = torch.nn.Parameter(torch.ones(2, 2))
    beside = torch.optim.SGD([stranger], 0.1)

    def body(model, optimizer, batch):
        stranger.grad = torch.ones(2, 2)
        beside.step()
        backward(model, batch)
        beside.step()
        optimizer.step()
        optimizer.zero_grad()

    assert same(snapshot(run(body)), snapshot(plain["sketch"]))


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", EXACT)
def test_two_models_at_once_do_not_meet(plain, kind):
    models = [wrap(subspace=kind) for _ in range(2)]
    optimizers = [adamw(m) for m in models]
    for batch in BATCHES:
        for model in models:
            backward(model, batch)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(same(snapshot(m), snapshot(plain[kind])) for m in models)


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_that_begins_at_zero(kind):
    model = wrap(subspace=kind)
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(n, 3) / 3 * (1 - n / 20))
    rates, falls = [], []
    for number in range(20):
        loss = model(**BATCHES[number % 2]).loss
        loss.backward()
        before = logits(model.train())
        model.train()
        optimizer.step()
        falls.append(float((logits(model) - before).abs().max()))
        model.train()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        optimizer.zero_grad()
    layerpeft.check_trained(model)
    moved = falls[:1] + falls[3:]
    assert moved[0] == 0.0 == rates[0] or kind == "svd"  # nothing trains at a rate of zero
    assert all(f > 0 for f in falls[1:]) and falls[19] < 0.2 * max(falls)
    assert all(r >= 6 and not failed for r, failed, _ in refreshes(model))


def test_a_group_that_is_added_later(plain):
    model = wrap()
    held = trained(model)
    optimizer = torch.optim.AdamW(held[:4], 1e-2)
    optimizer.add_param_group({"params": held[4:], "lr": 1e-2})
    train(model, optimizer=optimizer)
    assert same(snapshot(model), snapshot(plain["sketch"]))


def test_a_gradient_that_is_not_finite_keeps_the_basis_and_is_counted():
    model = train(wrap(stagger=False), 3)
    optimizer = adamw(model)
    before = {n: state_of(layer).refreshes for n, layer in modules(model).items()}
    batch = make_batches()[0]
    (model(**batch).loss * torch.inf).backward()
    for p in trained(model):
        p.grad = torch.zeros_like(p)  # a loop that repairs its gradients by itself
    optimizer.step()
    assert {n: state_of(layer).refreshes for n, layer in modules(model).items()} == before
    assert {state_of(layer).failed for layer in modules(model).values()} == {1}
    optimizer.zero_grad()
    train(model, 2, optimizer=optimizer)
    assert all(r == before[n] + 1 for (n, _), (r, _, _) in zip(modules(model).items(), refreshes(model), strict=True))


def test_gradient_norms_are_those_of_the_projected_gradient():
    full = llama()
    backward(full, BATCHES[0])
    for scale in (0.25, 2.0):
        model = wrap(scale=scale, subspace="random")
        backward(model, BATCHES[0])
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained(model)])
        parts = []
        for name, layer in modules(model).items():
            whole = full.get_parameter(f"{name}.weight").grad
            parts.append((whole @ layer.lora_A["default"].weight.T).norm())
        assert float(norm) == pytest.approx(float(torch.stack(parts).norm()), rel=1e-4)
