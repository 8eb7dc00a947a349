"""Experts in one 3-D weight, trained by projection: a basis per expert, the branch on each expert's own rows."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe

import layerpeft
from layerpeft import LayerLoraConfig, check_trained
from layerpeft.tuners.galore import subspace
from layerpeft.tuners.galore.projection import as_stored, basis_of, like_trained, state_of, trained_of
from tests.helpers.expert_models import EXPERTS, RANK, batches, build, modules, run, wrap
from tests.helpers.loops import adamw, record
from tests.helpers.models import MODELS, batch

MOE = ("mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "qwen3_next", "jamba")
EXACT = {"subspace": "svd", "basis": "raw", "stagger": False}

# training in the grouped matmul, the gathered one and the loop


@pytest.mark.spread(2)
@pytest.mark.matrix("how,side")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MOE)
def test_the_gradient_is_that_of_each_expert_projected(name, how, side):
    dtype = torch.float32 if how == "grouped_mm" else torch.float64  # torch's grouped matmul knows no float64
    plain = build(name, how, dtype)
    model = wrap(copy.deepcopy(plain), proj_type=side)
    data = batch(name, plain, length=16)
    loss, expected = model(**data).loss, plain(**data).loss
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    whole, layers = dict(plain.named_parameters()), modules(model)
    assert len(layers) == (2 if name == "jamba" else 4)  # Jamba has experts in every second layer only
    for target, layer in layers.items():
        gradient, basis = as_stored(layer, whole[target].grad), basis_of(layer)
        assert basis.shape[:2] == (4, RANK) and gradient.abs().max() > 0
        wanted = gradient @ basis.mT if side == "right" else basis @ gradient
        got = like_trained(layer, trained_of(layer).grad.contiguous())
        most = 1e-10 if dtype == torch.float64 else 1e-5
        assert float((got - wanted).abs().max()) <= most * float(wanted.abs().max())


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_all_implementations_compute_the_same(monkeypatch, name, rank):
    start, data, found = run(wrap(build(name), r=rank, update_proj_gap=2), 3), batch(name, MODELS[name]()), {}
    for how in ("eager", "batched_mm", "grouped_mm", "grouped_mm without torch's own"):
        if how.endswith("own"):
            monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
        model = copy.deepcopy(start)
        model.base_model.model.set_experts_implementation(how.partition(" ")[0])
        loss = model(**data).loss
        loss.backward()
        found[how] = [loss.detach(), *(trained_of(layer).grad for layer in modules(model).values())]
    assert len(found["eager"]) == 5 and any(bool(trained_of(layer).any()) for layer in modules(start).values())
    for how, values in found.items():
        for one, other in zip(values, found["eager"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4, msg=lambda m, how=how: f"{how}: {m}")


def by_hand(model, targets, scale, rate, gap, side, steps, first):
    """AdamW per expert in a subspace of its full gradient, renewed every `gap` steps, on the weights themselves."""
    weights = {n: p.requires_grad_(n in targets) for n, p in model.named_parameters()}
    held = {n: [torch.zeros(()), torch.zeros(())] for n in targets}
    bases, data = dict(first), batches()
    for number in range(steps):
        model.zero_grad()
        model(**data[number % len(data)]).loss.backward()
        for name in targets:
            weight = weights[name]
            for expert in range(len(weight)):
                gradient = weight.grad[expert]
                if number % gap == 0 and bool(gradient.any()):
                    bases[name, expert] = subspace.strongest(gradient, RANK, side).double()
            q = torch.stack([bases[name, e] for e in range(len(weight))])
            small = weight.grad @ q.mT if side == "right" else q @ weight.grad
            mean, square = held[name] = [
                b * m + (1 - b) * s for b, m, s in zip((0.9, 0.999), held[name], (small, small**2), strict=True)
            ]
            mean, square = mean / (1 - 0.9 ** (number + 1)), square / (1 - 0.999 ** (number + 1))
            change = mean / (square.sqrt() + 1e-14)
            weight.data -= rate * scale * (change @ q if side == "right" else q.mT @ change)
    return {n: weights[n].detach() for n in targets}


@pytest.mark.spread(2)
@pytest.mark.parametrize("side", ["right", "left"])
def test_steps_with_refreshes_are_those_on_the_full_gradients(side):
    plain = build(how="eager", dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    model = wrap(copy.deepcopy(plain), update_proj_gap=3, proj_type=side, **EXACT)
    layers = modules(model)
    first = {(n, e): basis_of(layer)[e].clone() for n, layer in layers.items() for e in range(4)}
    run(model, 10, adamw(model, eps=1e-14, weight_decay=0.0))
    assert {(s.refreshes, s.failed, s.folds.count) for s in map(state_of, layers.values())} == {(4, 0, 3)}
    check_trained(model)
    merged = dict(model.merge_and_unload().named_parameters())
    wanted = by_hand(plain, list(layers), 0.25, 1e-2, 3, side, 10, first)
    for name in layers:
        movement = float((wanted[name] - before[name]).abs().max())
        difference = float((merged[name] - wanted[name]).abs().max())
        assert movement > 5e-3 and difference <= 1e-6 * movement, (name, movement, difference)


class Shapes(TorchDispatchMode):
    """Shapes of the tensors that operations make, views of what is there already left out."""

    def __init__(self, known):
        super().__init__()
        self.known, self.made = {t.untyped_storage()._cdata for t in known}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                self.made.add(tuple(sorted(leaf.shape)) if leaf.dim() == 3 else (leaf.numel(),))
        return result


def whole_shapes(model, data):
    """What of a whole weight's size a forward and backward pass makes."""
    weights = [p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))]
    with Shapes([*model.parameters(), *model.buffers()]) as seen:
        model(**data).loss.backward()
    assert len(seen.made) > 10
    return {tuple(p.shape) for p in weights if tuple(sorted(p.shape)) in seen.made or (p.numel(),) in seen.made}


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm", "without torch's own"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_nothing_of_a_whole_weights_shape_is_made(monkeypatch, name, how):
    if how.startswith("without"):
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
        how = "grouped_mm"
    data = batch(name, MODELS[name](), length=13)
    model = wrap(build(name, how), update_proj_gap=2, stagger=False)
    for _ in range(2):  # a step that shows the next basis, and an ordinary one
        watched = {state_of(layer).watched for layer in modules(model).values()}
        assert not whole_shapes(model, data)
        run(model, 1)
    assert watched == {False}
    plain = LayerLoraConfig(select="last:2", r=RANK, target_modules=[], target_parameters=EXPERTS)
    assert whole_shapes(layerpeft.get_peft_model(build(name, how), plain), data)


def test_checkpointing_gives_the_same_gradients():
    model = run(wrap(update_proj_gap=2), 3)
    found = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model)
        if checkpointing:
            twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        twin(**batches()[0]).loss.backward()
        found.append([trained_of(layer).grad for layer in modules(twin).values()])
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(*found, strict=True))


# bases


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sketch_that_sees_everything_finds_what_the_full_gradient_has(side):
    found = {}
    for kind in ("sketch", "svd"):
        model = wrap(subspace=kind, oversample=96, basis="raw", proj_type=side, stagger=False)
        run(model, 1, adamw(model, 0.0 if kind == "sketch" else 1e-9))
        found[kind] = {n: basis_of(layer).clone() for n, layer in modules(model).items()}
    for name, bases in found["svd"].items():
        for expert in range(4):
            assert subspace.overlap(found["sketch"][name][expert], bases[expert]) > 1 - 1e-4


@pytest.mark.spread(2)
@pytest.mark.parametrize("kind", ["sketch", "svd", "random"])
def test_every_kind_of_subspace_trains_and_keeps_its_rows_orthonormal(kind):
    model = run(wrap(subspace=kind, update_proj_gap=2), 9, data=batches(4))
    check_trained(model)
    for layer in modules(model).values():
        state, basis = state_of(layer), basis_of(layer)
        assert state.refreshes >= 4 and state.failed == 0 and state.folds.count >= 3
        torch.testing.assert_close(basis @ basis.mT, torch.eye(RANK).expand(4, -1, -1), atol=1e-5, rtol=0)
        assert len({tuple(b.flatten().tolist()) for b in basis}) == 4


def only_two_experts(model):
    """Routers that send every token to the experts 0 and 2."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.zero_()
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _, args, out: (out[0], torch.full_like(out[1], 0.5), torch.tensor([[0, 2]]).expand_as(out[2]))
        )
    return model


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["sketch", "svd"])
def test_experts_that_no_token_reached_keep_their_basis(kind, how):
    model = wrap(only_two_experts(build(how=how)), subspace=kind, update_proj_gap=2)
    layers = modules(model)
    first = {n: basis_of(layer).clone() for n, layer in layers.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, 6)
    check_trained(model)
    for name, layer in layers.items():
        kept = [torch.equal(basis_of(layer)[e], first[name][e]) for e in range(4)]
        assert kept == [False, True, False, True] and state_of(layer).failed == 0
        weight, start = layer.get_param(), before[f"{PREFIX}{base_name(name)}"]
        moved = [not torch.equal(weight[e], start[e]) for e in range(4)]
        assert moved == [True, False, True, False]


PREFIX = "base_model.model."


def base_name(name):
    """Of two wrapped weights the last one is wrapped first, so both lie under two wrappers."""
    owner, _, parameter = name.rpartition(".")
    return f"{owner}.base_layer.base_layer.{parameter}"


def test_a_gradient_that_is_not_finite_keeps_all_bases_and_is_counted(monkeypatch):
    model = wrap(stagger=False)
    first = {n: basis_of(layer).clone() for n, layer in modules(model).items()}
    monkeypatch.setattr(subspace, "strongest", lambda *_, **__: None)
    run(model, 2)
    for name, layer in modules(model).items():
        assert torch.equal(basis_of(layer), first[name]) and state_of(layer).failed == 2


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("policy", ["keep", "project", "reset"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_moments_are_turned_expert_by_expert(policy, side):
    model = wrap(moments=policy, proj_type=side, update_proj_gap=2, basis="raw", stagger=False)
    optimizer = adamw(model)
    run(model, 2, optimizer)
    plain = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    old = {n: basis_of(layer).clone() for n, layer in modules(model).items()}
    run(model, 1, optimizer, start=2)
    twin, kept = plain[0], plain[1]
    for layer in modules(twin).values():
        state_of(layer).due = 99  # the same step without a refresh
    again = adamw(twin)
    again.load_state_dict(kept)
    run(twin, 1, again, start=2)
    for (name, layer), other in zip(modules(model).items(), modules(twin).values(), strict=True):
        now = like_trained(layer, optimizer.state[trained_of(layer)]["exp_avg"])
        then = like_trained(other, again.state[trained_of(other)]["exp_avg"])
        assert not torch.equal(basis_of(layer), old[name])
        turn = old[name] @ basis_of(layer).mT
        wanted = {"keep": then, "reset": torch.zeros_like(then)}
        wanted["project"] = then @ turn if side == "right" else turn.mT @ then
        torch.testing.assert_close(now, wanted[policy], atol=1e-8, rtol=1e-4)


# the base, and what is merged


@pytest.mark.spread(2)
@pytest.mark.matrix("fold,dtype")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("fold", ["beside", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_comes_back_bit_for_bit(name, fold, dtype):
    plain, data = build(name, dtype=dtype), batches(2, name=name)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    with torch.no_grad():
        expected = plain.eval()(**data[0]).logits
    model = run(wrap(plain, fold=fold, update_proj_gap=2), 7, data=data).eval()
    layers = modules(model)
    assert all(state_of(layer).folds.count >= 2 for layer in layers.values())
    assert all(state_of(layer).original.device.type == "cpu" for layer in layers.values())
    with torch.no_grad():
        trained = model(**data[0]).logits
        with model.disable_adapter():
            assert torch.equal(model(**data[0]).logits, expected)
        assert torch.equal(model(**data[0]).logits, trained) and not torch.allclose(trained, expected, atol=1e-3)
        model.merge_adapter()
        merged = model(**data[0]).logits
        model.unmerge_adapter()
        assert torch.equal(model(**data[0]).logits, trained)
        torch.testing.assert_close(
            copy.deepcopy(model).merge_and_unload()(**data[0]).logits, merged, atol=1e-6, rtol=1e-5
        )
    torch.testing.assert_close(merged, trained, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-4)
    bare = model.unload()
    assert not any("base_layer" in n or "lora" in n for n, _ in bare.named_modules())
    now = dict(bare.named_parameters())
    assert set(now) == set(before) and all(torch.equal(now[n], p) for n, p in before.items())


def test_routers_and_other_layers_stay_as_they_were_and_modules_train_beside_experts():
    model = wrap(select="last:1", target_modules=["q_proj", "v_proj"], update_proj_gap=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = {n: state_of(layer).experts for n, layer in modules(model).items()}
    assert sorted(kinds.values()) == [0, 0, 4, 4] and all(".layers.2." in n for n in kinds)
    assert any("mlp.gate.weight" in n for n in before)
    run(model, 5)
    check_trained(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".layers.2." in n and "mlp.gate" not in n for n in moved)
    rows = {row.layer: row for row in layerpeft.layer_report(model).rows}
    assert rows[2].change > 0 and rows[1].change is None
    assert record(model).checks["end"].startswith("every chosen target moved")


def test_the_reported_change_is_that_of_the_weights():
    model = run(wrap(select="last:1", update_proj_gap=2), 5)
    before = {n: p.detach().clone() for n, p in build().named_parameters()}
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, layer in modules(model).items():
        change, weight = layer.trained_change()
        assert change == pytest.approx(float((merged[name] - before[name]).double().square().sum()), rel=1e-3)
        assert weight == pytest.approx(float(before[name].double().square().sum()), rel=1e-6)


def test_a_copy_and_a_pickle_go_on_by_themselves():
    model = run(wrap(update_proj_gap=2), 3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded, twin = torch.load(file, weights_only=False).eval(), copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batches(1)[0]).logits, model.eval()(**batches(1)[0]).logits)
    run(model.train(), 4)
    run(twin, 4)
    for one, other in zip(modules(model).values(), modules(twin).values(), strict=True):
        assert torch.equal(trained_of(one), trained_of(other)) and torch.equal(one.get_param(), other.get_param())
        assert state_of(other).refreshes >= 3
