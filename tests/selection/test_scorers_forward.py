"""Scorers that watch forward passes: against small implementations of their formulas, on every architecture, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerpeft import layer_map, score_layers
from layerpeft.errors import ScoreError
from layerpeft.selection.scorers import cka
from tests.helpers.hidden import llama, looks, padded, same, scored, texts
from tests.helpers.models import batch
from tests.helpers.repeating import some
from tests.model.test_architectures import CASES, build, targets_of

N = 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def batches(model: nn.Module) -> list[dict[str, Any]]:
    return [padded("llama", model, seed=seed) for seed in range(3)]


# ---- influence, cka --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["all", "last"])
def test_influence(model, batches, pool):
    want = []
    for layer in texts(model, batches):
        turned = [
            1 - a @ b / math.sqrt((a @ a) * (b @ b))
            for x, y in layer
            for a, b in list(zip(x, y, strict=True))[-1 if pool == "last" else 0 :]
        ]
        want.append(sum(turned) / len(turned))
    assert scored(model, "influence", batches, pool=pool) == pytest.approx(want, rel=1e-6)
    assert scored(model, "influence", batches, pool=pool, first="low") == pytest.approx([-w for w in want], rel=1e-6)


def u_centred(x: np.ndarray) -> np.ndarray:
    n = len(x)
    k = x @ x.T
    np.fill_diagonal(k, 0)
    u = k - k.sum(0)[None] / (n - 2) - k.sum(1)[:, None] / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(u, 0)
    return u / math.sqrt(n * (n - 3))


def centred(x: np.ndarray) -> np.ndarray:
    h = np.eye(len(x)) - 1 / len(x)
    return h @ x @ x.T @ h / (len(x) - 1)


@pytest.mark.parametrize(("hsic", "kernel"), [("unbiased", u_centred), ("biased", centred)])
@pytest.mark.parametrize(("pool", "samples"), [("last", 128), ("mean", 5), ("all", 20)])
def test_cka(model, batches, hsic, kernel, pool, samples):
    want = []
    for layer in texts(model, batches):
        pooled = [{"last": t[-1:], "mean": t.mean(0, keepdims=True), "all": t} for pair in layer for t in pair]
        x, y = (np.concatenate([p[pool] for p in pooled[side::2]]) for side in (0, 1))
        cuts = [i for i in range(0, len(x), samples) if len(x) - i >= 4]
        pairs = [(kernel(x[i : i + samples]), kernel(y[i : i + samples])) for i in cuts]
        both, left, right = (sum((p[i] * p[j]).sum() for p in pairs) for i, j in ((0, 1), (0, 0), (1, 1)))
        want.append(1 - both / math.sqrt(left * right))
    assert scored(model, "cka", batches, hsic=hsic, pool=pool, samples=samples) == pytest.approx(want, abs=1e-6)


def test_unbiased_cka_of_unrelated_samples_is_about_zero_and_biased_is_not():
    draw = torch.Generator().manual_seed(0)
    sums = {True: torch.zeros(3).double(), False: torch.zeros(3).double()}
    for _ in range(300):
        x, y = (torch.randn(8, 64, generator=draw) for _ in range(2))
        for unbiased in sums:
            sums[unbiased] += cka.hsics(x, y, unbiased)
    assert abs(cka.cka(sums[True])) < 0.05 < 0.8 < cka.cka(sums[False])
    assert cka.cka(cka.hsics(x, 3 * x + 1)) == pytest.approx(1)


def test_states_that_do_not_vary_are_alike_only_to_such(model, batches):
    ends = [{k: v.clone() for k, v in one.items()} for one in batches]
    for one in ends:
        one["attention_mask"][:] = 1
        one["input_ids"][:, -1] = 7
    values = scored(model, "cka", ends)
    assert values[0] == 1.0 and all(v < 1 for v in values[1:])
    same_rows = [{k: v[:1].repeat(4, 1) for k, v in batches[0].items()}]
    assert scored(model, "cka", same_rows) == (0.0, 0.0, 0.0)


def test_too_few_texts_for_cka_are_told(model, batches):
    with pytest.raises(ScoreError, match=r"cka needs 4 texts at least, and the batches hold 3; give more batches"):
        scored(model, "cka", [{k: v[:3] for k, v in batches[0].items()}])


# ---- every architecture ----------------------------------------------------------------------------------------------

ALL: dict[str, dict[str, Any]] = {
    "influence": {},
    "cka": {},
    "lens": {"measure": "kl"},
    "representation": {"measure": "invariance"},
    "linearity": {},
    "intrinsic_dimension": {},
    "removal": {},
    "probe": {"form": "gain", "folds": 2},
    "language": {"measure": "gap"},
}
FEW = [("llama", None), ("t5", None), ("mamba", None), ("vit", None)]


def refused(by: str, name: str, stack: str | None) -> str:
    """Why a scorer refuses an architecture; empty where it does not."""
    if name == "llama_bare" and by in ("lens", "removal"):
        return "holds no logits"
    if name in ("vit", "dinov2", "whisper") and by == "representation":
        return "have no input_ids; take measure: entropy or curvature"
    return ""


@pytest.mark.spread(2)
@pytest.mark.parametrize(("name", "stack"), some(CASES, FEW))
def test_finite_deterministic_and_without_a_trace(name, stack):
    model = build(name)
    count = len(layer_map(model, stack))
    before = looks(model)
    for by, options in ALL.items():
        inputs = [batch(name, model, rows=8, length=16, seed=seed) for seed in range(2)]
        if by == "probe":
            inputs = [one | {"classes": torch.arange(8) % 2} for one in inputs]
        asked: dict[str, Any] = {"batches": inputs, "stack": stack, "progress": False, **targets_of(name), **options}
        why = refused(by, name, stack)
        if why:
            with pytest.raises(ScoreError, match=why):
                score_layers(model, by, **asked)
        else:
            first = score_layers(model, by, **asked)
            assert len(first.values) == count and all(map(math.isfinite, first.values)), by
            assert by == "probe" or len(set(first.values)) > 1, by
            assert score_layers(model, by, **asked) == first, by
        assert same(looks(model), before), by


# ---- what they cost --------------------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("by", ["influence", "cka"])
def test_no_more_than_the_forward_passes(model, batches, by):
    plain = operations(lambda: [model(**one) for one in batches])
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    cost = operations(lambda: scored(model, by, batches))
    handle.remove()
    assert len(calls) == len(batches) and plain <= cost <= 1.1 * plain


COSTS: dict[str, tuple[dict[str, Any], int]] = {  # forward passes besides those that are watched, of N layers
    "representation": ({"measure": "invariance"}, 1),
    "removal": ({}, 1 + N),
    "removal, greedy": ({"greedy": True}, N * (N + 3) // 2),
    "linearity": ({}, 0),
    "intrinsic_dimension": ({}, 0),
    "language": ({}, 0),
}


@pytest.mark.parametrize("by", COSTS)
def test_forward_passes_of_the_others(model, batches, by):
    options, more = COSTS[by]
    calls: list[int] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    scored(model, by.partition(",")[0], batches, **options)
    handle.remove()
    assert len(calls) == len(batches) * (1 + more)


def test_the_lens_runs_the_head_for_every_layer_and_no_layer_again(model, batches):
    plain = operations(lambda: [model(**one) for one in batches])
    states = [torch.zeros(*one["input_ids"].shape, model.config.hidden_size) for one in batches]
    head = operations(lambda: [model.lm_head(s) for s in states])
    cost = operations(lambda: scored(model, "lens", batches))
    assert cost == plain + (N + 1) * head
