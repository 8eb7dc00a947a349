"""Gradient projection: its config, its bases, and when they are renewed."""

from __future__ import annotations

import logging

import peft
import pytest
import torch

import layerpeft
from layerpeft import LayerGaloreConfig, check_trained
from layerpeft.errors import ConfigError
from layerpeft.integrations.peft import lora_layers
from layerpeft.tuners.galore import subspace
from layerpeft.tuners.galore.projection import basis_of, fixed_of, projections, state_of, trained_of
from tests.helpers.loops import LAYERS, adamw, chosen, llama, make_batches, record, step

TARGETS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def batches():
    return make_batches()


def wrap(select="last:2", model=None, **options):
    options = {"r": 4, "update_proj_gap": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return layerpeft.get_peft_model(llama() if model is None else model, LayerGaloreConfig(select=select, **options))


def modules(model):
    return dict(projections(model.base_model.model, "default"))


def train(model, optimizer, batches, steps):
    for number in range(steps):
        step(model, optimizer, batches[number % len(batches)])


# the config


def test_defaults_are_those_of_the_reference():
    config = LayerGaloreConfig()
    found = config.r, config.update_proj_gap, config.scale, config.proj_type, config.subspace, config.basis, config.fold
    assert found == (128, 200, 0.25, "right", "sketch", "aligned", "beside") and config.peft_type == "LAYER_GALORE"


def test_every_problem_of_a_config_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        LayerGaloreConfig(
            r=0,
            scale=-1,
            subspace="skech",
            proj_type="full",
            use_dora=True,
            lora_alpha=3,
            select="lst:2",
            gap_overlap=2.0,
        )
    text = str(error.value)
    for part in ("r=0", "scale=-1", "'sketch'", "proj_type", "use_dora=True", "lora_alpha=3", "gap_overlap=2.0"):
        assert part in text, part


def test_only_the_chosen_modules_train_and_one_factor_of_each(batches):
    model = wrap()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in before if "lora_B" in n and any(f".layers.{i}." in n for i in (2, 3))
    }
    train(model, adamw(model), batches, 4)
    check_trained(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    held = {n.replace(".lora_B.default", ".base_layer") for n in before if "lora_B" in n}
    # what has just been folded stands at zero again
    assert moved | {n for n in before if "lora_B" in n} == {n for n in before if ".lora_" in n} | held
    assert sum("lora_B" in n for n in moved) >= 4


def test_a_rank_above_a_weight_is_cut_to_it(batches):
    model = wrap(r=24, target_modules=["k_proj", "up_proj"])
    shapes = {n: tuple(fixed_of(layer).shape) for n, layer in modules(model).items()}
    assert {s for n, s in shapes.items() if "k_proj" in n} == {(16, 32)}
    assert {s for n, s in shapes.items() if "up_proj" in n} == {(24, 32)}
    scales = {layer.scaling["default"] for layer in lora_layers(model.base_model.model, "default").values()}
    assert scales == {0.25}
    train(model, adamw(model), batches, 8)
    check_trained(model)


@pytest.mark.parametrize(
    ("proj_type", "side"),
    [
        ("right", ("right",) * 3),
        ("left", ("left",) * 3),
        ("std", ("right", "left", "right")),
        ("reverse_std", ("left", "right", "left")),
    ],
)
def test_the_side_that_is_projected(proj_type, side):
    model = wrap("last:1", proj_type=proj_type, target_modules=["q_proj", "v_proj", "up_proj"])
    found = {n.rpartition(".")[2]: state_of(layer).side for n, layer in modules(model).items()}
    assert (found["q_proj"], found["v_proj"], found["up_proj"]) == side  # (32, 32), (16, 32), (48, 32)


def test_the_gradient_of_the_trained_factor_is_the_projected_one_without_the_scale(batches):
    plain = llama()
    plain(**batches[0]).loss.backward()
    for proj_type in ("right", "left"):
        model = wrap("all", proj_type=proj_type, scale=0.125)
        model(**batches[0]).loss.backward()
        for name, layer in modules(model).items():
            whole, fixed = plain.get_parameter(f"{name}.weight").grad, fixed_of(layer)
            expected = whole @ fixed.T if proj_type == "right" else fixed.T @ whole
            assert torch.allclose(trained_of(layer).grad, expected, rtol=1e-4, atol=1e-8), name


def test_no_tensor_of_a_weights_shape_is_made_in_backward(batches):
    from torch.utils._python_dispatch import TorchDispatchMode

    wide = {"hidden_size": 64, "intermediate_size": 96}
    model = wrap("all", llama(**wide), stagger=False, oversample=4)
    shapes = {tuple(layer.get_base_layer().weight.shape) for layer in modules(model).values()} - {(64, 64)}
    shapes |= {s[::-1] for s in shapes}
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(tuple(t.shape) for t in [out] if isinstance(t, torch.Tensor) and not _is_view(func))
            return out

    loss = model(**batches[0]).loss
    with Watch():
        loss.backward()
    assert made and not shapes & set(made)
    exact = wrap("all", llama(**wide), subspace="svd")
    loss = exact(**batches[0]).loss
    made.clear()
    with Watch():
        loss.backward()
    assert shapes & set(made)  # what the watch would see


def _is_view(func):
    return any(r.alias_info is not None for r in func._schema.returns)


# bases


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["sketch", "svd", "random"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_bases_are_orthonormal_and_renewed(batches, kind, side):
    model = wrap(subspace=kind, proj_type=side, stagger=False, update_proj_gap=2)
    first = {n: basis_of(layer).clone() for n, layer in modules(model).items()}
    train(model, adamw(model), batches, 5)
    for name, layer in modules(model).items():
        basis = basis_of(layer)
        assert torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-5)
        assert not torch.allclose(basis, first[name]) and state_of(layer).refreshes == 3  # at steps 0, 2 and 4
        # the first basis has trained only under a sketch, whose result serves from the next step on
        assert state_of(layer).folds.count == (2 if kind == "svd" else 3)


@pytest.mark.parametrize("warm", [False, True])
def test_a_sketch_finds_what_the_svd_finds(warm):
    draw = torch.Generator().manual_seed(0)
    strength = 0.7 ** torch.arange(48.0)
    left = torch.linalg.qr(torch.randn(64, 48, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(96, 48, generator=draw))[0]
    gradient = (left * strength) @ right.T
    trained = gradient @ right[:, :8] if warm else torch.zeros(64, 8)
    omega = subspace.sketching_matrix("key", trained, 16)
    assert torch.allclose(omega.T @ omega, torch.eye(24), atol=1e-5)
    found = subspace.strongest(omega.T @ gradient, 8, "right")
    exact = subspace.strongest(gradient, 8, "right")
    kept = float((gradient @ found.T).square().sum() / (gradient @ exact.T).square().sum())
    assert kept > (0.9999 if warm else 0.99)
    assert subspace.overlap(found, exact) > 0.9


def test_an_aligned_basis_spans_the_same_and_is_nearest():
    old = subspace.random_basis("old", 4, 16, torch.zeros(1))
    new = subspace.random_basis("new", 4, 16, torch.zeros(1))
    turned = subspace.aligned(new, old)
    assert torch.allclose(turned.T @ turned, new.T @ new, atol=1e-5)
    assert (turned - old).norm() < (new - old).norm()
    flipped = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])) @ old
    assert torch.allclose(subspace.aligned(flipped, old), old, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_what_is_not_finite_or_nothing_gives_no_basis(bad):
    assert subspace.strongest(torch.full((4, 8), bad), 2, "right") is None
    assert subspace.strongest(torch.ones(1, 8), 2, "right") is None


# when


def test_refreshes_are_spread_over_the_gap(batches):
    model = wrap("all", update_proj_gap=12)  # twelve modules
    optimizer, counts = adamw(model), []
    for number in range(40):
        before = {n: state_of(layer).refreshes for n, layer in modules(model).items()}
        step(model, optimizer, batches[number % 8])
        counts.append(sum(state_of(layer).refreshes - before[n] for n, layer in modules(model).items()))
    assert counts[0] == 12 and max(counts[1:]) == 1 and min(counts[13:]) == 1
    check_trained(model)


def test_micro_batches_make_one_sketch_of_their_sum(batches):
    whole = {k: torch.cat([b[k] for b in batches[:4]]) for k in batches[0]}
    bases = []
    for parts, factor in (([whole], 1.0), (batches[:4], 0.25)):
        model = wrap(model=llama().double(), stagger=False, basis="raw")
        optimizer = adamw(model)
        for part in parts:
            (factor * model(**part).loss).backward()
        optimizer.step()
        bases.append({n: basis_of(layer).clone() for n, layer in modules(model).items()})
    for name, basis in bases[0].items():
        assert subspace.overlap(bases[1][name], basis) == pytest.approx(1.0, abs=1e-5)


def test_a_module_whose_subspace_stays_waits_longer(batches):
    model = wrap("last:1", update_proj_gap=2, gap_overlap=0.01, stagger=False)
    train(model, adamw(model), batches, 12)
    assert {state_of(layer).gap for layer in modules(model).values()} > {2} or all(
        state_of(layer).gap in (4, 8, 16) for layer in modules(model).values()
    )
    fixed = wrap("last:1", update_proj_gap=2, gap_overlap=1.0, stagger=False)
    train(fixed, adamw(fixed), batches, 12)
    assert {state_of(layer).gap for layer in modules(fixed).values()} == {2}
    assert {state_of(layer).refreshes for layer in modules(fixed).values()} == {6}


@pytest.mark.matrix
@pytest.mark.parametrize("policy", ["keep", "project", "reset"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_moments_at_a_refresh(batches, policy, side):
    model = wrap("last:1", update_proj_gap=3, moments=policy, proj_type=side, stagger=False, basis="raw")
    optimizer = adamw(model)
    train(model, optimizer, batches, 3)
    layer = modules(model)["model.layers.3.self_attn.q_proj"]
    old, kept = basis_of(layer).clone(), {}
    optimizer.register_step_post_hook(lambda *_: None)

    def remember(*_):
        kept.update({k: v.clone() for k, v in optimizer.state[trained_of(layer)].items()})

    plain = torch.optim.AdamW.step
    optimizer.step = lambda *a, **k: plain(optimizer, *a, **k)
    from layerpeft.tuners.galore import projection

    rotate = projection.rotate

    def watched(before, after, means, squares, *rest):
        if policy == "keep" or means[0] is optimizer.state[trained_of(layer)]["exp_avg"]:
            remember()
        rotate(before, after, means, squares, *rest)

    projection.rotate = watched
    try:
        step(model, optimizer, batches[3])
    finally:
        projection.rotate = rotate
    new, now = basis_of(layer), optimizer.state[trained_of(layer)]
    turn = old @ new.T
    expected = {"keep": kept["exp_avg"], "reset": torch.zeros_like(kept["exp_avg"])}
    expected["project"] = kept["exp_avg"] @ turn if side == "right" else turn.T @ kept["exp_avg"]
    assert torch.allclose(now["exp_avg"], expected[policy], atol=1e-7)
    assert bool((now["exp_avg_sq"] >= 0).all()) and float(kept["exp_avg"].abs().max()) > 0
    assert policy != "keep" or torch.equal(now["exp_avg_sq"], kept["exp_avg_sq"])


def test_a_subspace_that_cannot_be_found_keeps_the_old_one_and_is_counted(batches, monkeypatch, caplog):
    model = wrap("last:1", update_proj_gap=2, stagger=False)
    optimizer = adamw(model)
    train(model, optimizer, batches, 1)
    bases = {n: basis_of(layer).clone() for n, layer in modules(model).items()}
    monkeypatch.setattr(subspace, "strongest", lambda *_, **__: None)
    with caplog.at_level(logging.INFO, logger="layerpeft"):
        train(model, optimizer, batches, 3)
    assert all(torch.equal(basis_of(layer), bases[n]) for n, layer in modules(model).items())
    assert {state_of(layer).failed for layer in modules(model).values()} == {2}  # tried again at the next step
    assert "no new subspace was found" in caplog.text
    check_trained(model)


@pytest.mark.parametrize("count", [1, 3])
def test_a_deferred_choice(batches, count):
    model = wrap({"by": "gradient_norm", "keep": 2})
    optimizer = adamw(model)
    assert len(modules(model)) == 3 * LAYERS
    step(model, optimizer, *batches[:count])
    scores = layerpeft.score_layers(
        llama(), batches=batches[:count], num_batches=count, target_modules=TARGETS, progress=False
    )
    assert chosen(model) == tuple(sorted(scores.ranked()[:2]))
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)
    assert len(modules(model)) == 6 and record(model).method == "galore"
    train(model, optimizer, batches, 9)
    assert all(state_of(layer).refreshes >= 2 for layer in modules(model).values())
    check_trained(model)


def test_a_random_subspace_is_drawn_from_the_seed(batches):
    bases = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 10)
        model = wrap("last:1", subspace="random", seed=seed, update_proj_gap=2)
        train(model, adamw(model), batches, 3)
        bases.append([basis_of(layer).clone() for layer in modules(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(bases[0], bases[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(bases[0], bases[2], strict=True))


def test_the_loss_falls_with_a_sketch_as_with_the_svd(batches):
    falls = {}
    for kind in ("sketch", "svd", "random"):
        model = wrap("all", r=8, scale=1.0, subspace=kind, update_proj_gap=5)
        optimizer, losses = adamw(model, 1e-2), []
        for number in range(24):
            loss = model(**batches[number % 2]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        falls[kind] = sum(losses[:2]) - sum(losses[-2:])
    assert falls["sketch"] > 0.9 * falls["svd"] > 0.2
    assert falls["svd"] > falls["random"]
    print(falls)


def test_beside_another_adapter_it_is_refused_and_never_becomes_ordinary_lora():
    config = LayerGaloreConfig(select="last:2", r=4, target_modules=["v_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="no stock config that means the same"):
        config.resolve(llama())
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {n for n, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="takes a model without other adapters"):
        model.add_adapter("other", config)
    assert {n for n, _ in model.named_parameters()} == before
