"""Scorers of weights and of gradients against golden values and small implementations of their own."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import peft
import pytest
import torch

from layerpeft import LayerLoraConfig, get_peft_model, layer_map, score_layers
from layerpeft.errors import ScoreError
from layerpeft.model.targets import match_targets
from layerpeft.selection.probe import Exact
from layerpeft.selection.scorers import heavy_tail
from layerpeft.selection.statistics import Absolute, Agreement, Nuclear
from layerpeft.tuners import trial
from tests.helpers.models import batch
from tests.helpers.repeating import some
from tests.helpers.short import LAYERS
from tests.model.test_architectures import EXPERTS, MAPPED, MOE, mapped, targets_of
from tests.selection.test_scorers import Blocks

STATISTICS = ("nuclear", "l1", "agreement")
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("heavy_tail", {}),
    ("heavy_tail", {"form": "averaged", "tail": "peak", "window": 8, "places": 3, "first": "heavy"}),
    ("weight_norm", {}),
    ("fisher", {}),
    *(("gradient_norm", {"statistic": name}) for name in STATISTICS),
    ("gradient_norm", {"statistic": "credit", "steps": 2, "k": 2}),
]
NAMES = ["q_proj", "down_proj"]
FEW = ("llama", "mixtral")


@pytest.fixture(scope="module")
def llama(_short):
    return copy.deepcopy(_short).eval()


@pytest.fixture(scope="module")
def rows(gsm8k_batches):
    """Three batches of real rows, the first words of each."""
    return [{name: tensor[:, :20] for name, tensor in one.items()} for one in gsm8k_batches[:3]]


def spectrum_of(name: str, size: int = 60) -> np.ndarray:
    draw = np.random.default_rng(size)
    return {"pareto": draw.pareto(1.7, size) + 1, "lognormal": np.exp(draw.normal(size=size))}[name]


def alpha_by_hand(values: np.ndarray, tail: str) -> float:
    """The published search, one start at a time, in numpy."""
    x = np.sort(values)
    n, logs = len(x), np.log(np.sort(values))
    if tail == "median":
        starts = [n // 2]
    elif tail == "best":
        starts = list(range(n - 1))
    else:
        counts, edges = np.histogram(np.log10(x), bins=100, range=(np.log10(x[0]), np.log10(x[-1])))
        peak = 10 ** edges[counts.argmax()]
        starts = [i for i in range(n - 1) if 0.95 * peak <= x[i] <= 1.5 * peak]
    best = (math.inf, math.nan)
    for i in starts:
        alpha = 1 + (n - i) / (logs[i:] - logs[i]).sum()
        distance = np.abs(1 - (x[i:] / x[i]) ** (1 - alpha) - np.arange(n - i) / (n - i)).max()
        best = min(best, (distance, alpha))
    return float(best[1])


# ---- heavy_tail ------------------------------------------------------------------------------------------------------


def test_the_exponent_has_its_golden_value():
    values = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4])
    assert heavy_tail.exponent(values) == pytest.approx(1.96180, abs=1e-5)
    assert heavy_tail.exponent(values[:4]) is None and heavy_tail.exponent(torch.ones(9)) is None
    assert heavy_tail.exponent(torch.zeros(9)) is None and heavy_tail.exponent(torch.zeros(0)) is None
    zeros = torch.cat([torch.zeros(5), values])  # a weight of low rank is judged by what is not zero
    assert heavy_tail.exponent(zeros) == heavy_tail.exponent(values)


@pytest.mark.parametrize("tail", ["median", "peak", "best"])
@pytest.mark.parametrize("kind", ["pareto", "lognormal"])
def test_the_exponent_is_the_published_one(kind, tail):
    values = spectrum_of(kind)
    assert heavy_tail.exponent(torch.tensor(values), tail) == pytest.approx(alpha_by_hand(values, tail), rel=1e-9)


def test_a_power_law_is_found_again():
    draw = np.random.default_rng(0).pareto(2.0, 20000) + 1  # density x^-3
    assert heavy_tail.exponent(torch.tensor(draw)) == pytest.approx(3.0, abs=0.1)


def test_heavy_tails_by_layer_and_their_sign():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 60, generator=generator)
    heavy = torch.linalg.qr(noise)[0] @ torch.diag(torch.logspace(1, -2, 40)) @ torch.linalg.qr(noise.T)[0].T
    model = Blocks(noise, heavy, torch.eye(8) + 0.01 * noise[:8, :8])
    light = score_layers(model, "heavy_tail", target_modules="all-linear")
    want = [alpha_by_hand(np.linalg.svd(b[0].weight.detach().numpy())[1] ** 2, "median") for b in model.blocks]
    assert light.values == pytest.approx(want, rel=1e-4)
    first = score_layers(model, "heavy_tail", first="heavy", target_modules="all-linear")
    assert first.values == pytest.approx([1 / (alpha - 1) for alpha in want], rel=1e-3)
    assert first.ranked() == light.ranked()[::-1]
    assert light.ranked()[-1] == 1  # the heavy one is trained well


def test_equal_windows_take_the_shape_out_of_it():
    """Noise is noise: one spectrum a weight says that a wide one is worse trained, windows do not (arXiv 2506.06280)."""
    generator = torch.Generator().manual_seed(0)
    model = Blocks(torch.randn(64, 64, generator=generator), torch.randn(64, 512, generator=generator))
    whole = score_layers(model, "heavy_tail", target_modules="all-linear").values
    equal = score_layers(model, "heavy_tail", form="averaged", window=24, places=4, target_modules="all-linear").values
    assert whole[1] > 1.5 * whole[0]
    assert equal[1] == pytest.approx(equal[0], rel=0.1)
    weight = model.blocks[1][0].weight.detach().numpy()
    tops, lefts = [round(40 * i / 3) for i in range(4)], [round(464 * i / 3) for i in range(4)]
    parts = [np.linalg.svd(weight[t : t + 24, s : s + 48])[1] ** 2 for t in tops for s in lefts]
    assert equal[1] == pytest.approx(alpha_by_hand(np.concatenate(parts), "median"), rel=1e-4)


def test_a_layer_without_a_tail_is_refused_by_name():
    with pytest.raises(ScoreError, match=r"no weight of blocks\.1 has a tail"):
        score_layers(Blocks(torch.randn(8, 8), torch.eye(8)), "heavy_tail", target_modules="all-linear")


def test_every_weight_is_decomposed_once(llama, monkeypatch):
    seen = []
    whole = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda a: seen.append(tuple(a.shape)) or whole(a))
    score_layers(llama, "heavy_tail", target_modules="all-linear")
    assert seen == [t.shape for t in layer_map(llama).targets]


# ---- weight_norm -----------------------------------------------------------------------------------------------------


def test_weight_norms_follow_their_definition(llama):
    plain = score_layers(llama, "weight_norm", target_modules="all-linear")
    even = score_layers(llama, "weight_norm", normalize="numel", target_modules="all-linear")
    for layer in layer_map(llama).layers:
        weights = torch.cat([llama.get_submodule(t.name).weight.detach().double().flatten() for t in layer.targets])
        assert plain.values[layer.index] == pytest.approx(float(weights.norm()), rel=1e-6)
        assert even.values[layer.index] == pytest.approx(float(weights.square().mean().sqrt()), rel=1e-6)
        name = layer.targets[0].name
        assert plain.targets[name] == pytest.approx(float(llama.get_submodule(name).weight.detach().norm()), rel=1e-5)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(llama, rows):
    """Batch -> target -> its gradient, from plain backward passes."""
    model, found = copy.deepcopy(llama), []
    for one in rows:
        model.zero_grad()
        model(**one).loss.backward()
        found.append({t.name: model.get_submodule(t.name).weight.grad.double() for t in held(layer_map(model).targets)})
        model.zero_grad(set_to_none=True)
    return found


def held(targets):
    return [t for t in targets if t.name.endswith(tuple(NAMES))]


def by_layer(model, part) -> list[float]:
    return [sum(part(t) for t in held(layer.targets)) for layer in layer_map(model).layers]


def scored(model, batches, by="gradient_norm", **options):
    return score_layers(model, by, batches=batches, target_modules=NAMES, progress=False, **options)


def test_fisher_is_the_mean_squared_gradient(llama, rows, gradients):
    trace = by_layer(llama, lambda t: sum(float(g[t.name].square().sum()) for g in gradients) / 3)
    sizes = by_layer(llama, lambda t: t.params)
    whole = scored(llama, rows, "fisher", exact=True, reduce="sum")
    assert whole.values == pytest.approx(trace, rel=1e-5)
    mean = scored(llama, rows, "fisher", exact=True)
    assert mean.values == pytest.approx([t / n for t, n in zip(trace, sizes, strict=True)], rel=1e-5)
    assert scored(llama, rows, "fisher").values == pytest.approx(mean.values, rel=0.15)
    name = held(layer_map(llama).targets)[0].name
    own = sum(float(g[name].square().mean()) for g in gradients) / 3
    assert mean.targets[name] == pytest.approx(own, rel=1e-5)


def test_l1_adds_up_every_element(llama, rows, gradients, monkeypatch):
    want = by_layer(llama, lambda t: sum(float(g[t.name].abs().sum()) for g in gradients) / 3)
    monkeypatch.setattr("layerpeft.selection.statistics.PIECE", 20_000)  # some rows at a time
    assert scored(llama, rows, statistic="l1").values == pytest.approx(want, rel=1e-5)
    sizes = by_layer(llama, lambda t: t.params)
    even = scored(llama, rows, statistic="l1", normalize="numel")
    assert even.values == pytest.approx([w / n for w, n in zip(want, sizes, strict=True)], rel=1e-5)


def test_norms_are_added_up_over_targets_and_batches(llama, rows, gradients):
    """Aletheia's score."""
    want = by_layer(llama, lambda t: sum(float(g[t.name].norm()) for g in gradients) / 3)
    assert scored(llama, rows, statistic="norms").values == pytest.approx(want, rel=1e-5)


def test_the_nuclear_norm_lies_within_its_stated_error(llama, rows, gradients):
    want = by_layer(llama, lambda t: sum(float(torch.linalg.svdvals(g[t.name]).sum()) for g in gradients) / 3)
    exact = scored(llama, rows, statistic="nuclear", exact=True)
    assert exact.values == pytest.approx(want, rel=1e-4) and exact.origin["error"] == [0.0] * len(want)
    errors = []
    for k in (8, 24):
        found = scored(llama, rows, statistic="nuclear", k=k)
        for low, true, error in zip(found.values, want, found.origin["error"], strict=True):
            assert low <= true * (1 + 1e-5) and true <= low * (1 + error) and error > 0
        errors.append(max(found.origin["error"]))
        assert found.ranked()[0] == exact.ranked()[0]
    assert errors[1] < errors[0]


def test_agreement_is_taken_element_by_element(llama, rows, gradients):
    def share(t) -> float:
        g = torch.stack([one[t.name] for one in gradients])
        rms = g.square().mean(0).sqrt()
        return float((g.mean(0).abs()[rms > 0] / rms[rms > 0]).mean())

    sizes = by_layer(llama, lambda t: t.params)
    want = [1 - a / n for a, n in zip(by_layer(llama, lambda t: share(t) * t.params), sizes, strict=True)]
    assert scored(llama, rows, statistic="agreement", k=10**4).values == pytest.approx(want, rel=1e-4)
    some_rows = [scored(llama, rows, statistic="agreement", seed=s).values for s in range(2)]
    assert some_rows[0] != some_rows[1]  # other rows
    for values in some_rows:
        assert values == pytest.approx(want, rel=0.05)
    same = [rows[0]] * 3
    assert scored(llama, same, statistic="agreement").values == pytest.approx([0.0] * len(want), abs=1e-5)
    with pytest.raises(ScoreError, match="compares batches, and there was one"):
        scored(llama, rows[:1], statistic="agreement")


def test_no_more_than_some_rows_of_a_gradient_are_kept():
    gy, x = torch.randn(20, 64), torch.randn(20, 48)
    how = Agreement(k=4)
    assert how.kept(how.part("t", 0, gy, x)).shape == (2, 16, 48)
    full = gy.T @ x
    assert all(any(torch.allclose(row, r, atol=1e-5) for r in full) for row in how.part("t", 0, gy, x))
    assert torch.equal(how.part("t", 0, gy, x), how.part("t", 1, gy, x))  # the same rows in every batch
    assert float(Absolute().part("t", 0, gy, x)) == pytest.approx(float(full.abs().sum()), rel=1e-5)
    low, left = Nuclear(k=4).part("t", 0, gy, x).tolist()
    assert low <= float(torch.linalg.svdvals(full).sum()) <= low + left
    assert float(Exact().energy("t", 0, gy, x)) == pytest.approx(float(full.square().sum()), rel=1e-5)


def test_credit_is_that_of_a_run_with_plain_peft(llama, rows):
    """First order, step by step: -g·Δθ over the factors of each layer, which is most of what the loss loses."""
    batches, rank, lr = rows[:2], 4, 1e-3
    model = peft.get_peft_model(
        copy.deepcopy(llama),
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=NAMES),
    )
    begin = trial.Factors(rank, 0)
    for target in held(layer_map(llama).targets):
        layer = find_module_in(model, target.name)
        x, y = torch.zeros(1, target.shape[1]), torch.zeros(1, target.shape[0])
        layer.lora_A["default"].weight.data = begin._of((target.name, 0), y, x)[0].detach().clone()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr)
    want, losses = [0.0] * LAYERS, []
    for step in range(4):
        loss = model.eval()(**batches[step % 2]).loss
        losses.append(loss.item())
        loss.backward()
        before = {n: p.detach().clone() for n, p in named.items()}
        optimizer.step()
        for name, p in named.items():
            want[int(name.split(".layers.")[1].split(".")[0])] -= float(
                (p.grad.double() * (p.detach() - before[name])).sum()
            )
        optimizer.zero_grad()
    found = scored(llama, rows, statistic="credit", steps=4, k=rank, lr=lr, num_batches=2)
    assert found.values == pytest.approx(want, rel=1e-3)
    assert (
        sum(found.values) == pytest.approx(losses[0] - losses[2] + losses[1] - losses[3], rel=0.5)
        and losses[2] < losses[0]
    )


def find_module_in(model, name):
    return model.base_model.model.get_submodule(name)


def test_credit_runs_as_many_passes_as_it_says(llama, rows, monkeypatch):
    passes = []
    handle = llama.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    scored(llama, rows, statistic="credit", steps=5, k=2)
    handle.remove()
    assert passes == [False] * 3 + [True] * 5
    with pytest.raises(ScoreError, match="before the layers are wrapped: pass batches="):
        get_peft_model(
            copy.deepcopy(llama), LayerLoraConfig(select={"by": "gradient_norm", "statistic": "credit", "keep": 1})
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "nuclear", "signal": True}, "signal: true is of statistic: frobenius"),
        ({"statistic": "agreement", "exact": True}, "raise k"),
        ({"statistic": "l1", "normalize": "weight"}, "write none or numel"),
        ({"statistic": "nuclear", "normalize": "numel"}, "write none$"),
        ({"statistic": "credit", "exact": True}, "forms no gradient"),
        ({"steps": 5}, "steps: is of statistic: credit"),
    ],
)
def test_options_that_do_not_go_together_are_named(llama, options, message):
    with pytest.raises(ScoreError, match=message):
        score_layers(llama, "gradient_norm", batches=[{}], progress=False, **options)


@pytest.mark.spread(2)
@pytest.mark.parametrize("by", ["fisher", *STATISTICS])
def test_the_losses_scale_is_divided_out(llama, rows, by):
    """As training under accumulation would show it: losses of another scale, and known."""
    from layerpeft.selection import plugins, scoring
    from layerpeft.selection.select import Select

    asked = {"by": by} if by == "fisher" else {"by": "gradient_norm", "statistic": by}
    layers = layer_map(llama)
    targets = match_targets(layers, ["q_proj"])
    found = []
    for scales in ((1.0, 1.0), (0.25, 8.0)):
        model = copy.deepcopy(llama)
        measurement = scoring.start(model, Select.parse(asked | {"keep": 1}), layers, targets, live=True)
        measurement.attach()
        for one, scale in zip(rows, scales):
            (model(**one).loss * scale).backward()
            measurement.next_batch(scale)
        measurement.detach()
        found.append(measurement.result().values)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert plugins.get("layerpeft.scorers", asked["by"]).needs is not None


# ---- on every architecture -------------------------------------------------------------------------------------------


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", some(sorted(set(MAPPED) - {"llama_bare"}), FEW))
def test_they_are_finite_and_leave_nothing_behind(name):
    model, _ = mapped(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    facts = [(p.requires_grad, p.grad) for p in model.parameters()]
    asked = dict(targets_of(name))
    if name in MOE:
        asked |= {"target_modules": [], "target_parameters": EXPERTS, "exclude_modules": None}
    batches = [batch(name, model, length=16, seed=seed) for seed in range(2)]
    random = torch.random.get_rng_state()
    for by, options in ASKED:
        given = {"batches": batches, "progress": False, **asked, **options}
        first, second = score_layers(model, by, **given), score_layers(model, by, **given)
        assert first == second and all(map(math.isfinite, first.values)), by
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert facts == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and not model.training
