"""Scorers of hidden states against small implementations of their formulas in numpy, and where the answer is known beforehand."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from sklearn.linear_model import Ridge
from torch import nn

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.errors import RecipeError, ScoreError
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import batches_for
from layerpeft.selection.scorers import intrinsic_dimension, language, linearity, probe, representation
from layerpeft.selection.states import Passage
from tests.helpers.hidden import llama, padded, passages, request_of, scored, texts
from tests.helpers.models import MODELS, batch

N = 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def batches(model: nn.Module) -> list[dict[str, Any]]:
    return [padded("llama", model, seed=seed) for seed in range(3)]


# ---- representation --------------------------------------------------------------------------------------------------


def entropy_of(z: np.ndarray) -> float:
    shares = np.linalg.svd(z, compute_uv=False) ** 2
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log(shares)).sum() / math.log(min(z.shape)))


def curvature_of(z: np.ndarray) -> float:
    steps = [b - a for a, b in zip(z, z[1:], strict=False)]
    turns = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(steps, steps[1:], strict=False)]
    return float(np.mean(np.arccos(turns)))


@pytest.mark.parametrize(("measure", "of"), [("entropy", entropy_of), ("curvature", curvature_of)])
def test_entropy_and_curvature_of_texts(model, batches, measure, of):
    want = [np.mean([of(y) for _, y in layer]) for layer in texts(model, batches)]
    assert scored(model, "representation", batches, measure=measure) == pytest.approx(want, rel=1e-5)


def test_golden_representations():
    line = torch.arange(5.0)[:, None] * torch.tensor([[3.0, 4.0, 0.0]])
    assert representation.prompt_entropy(line) == pytest.approx(0, abs=1e-9)
    assert representation.curvature(line) == pytest.approx(0, abs=1e-6)
    assert representation.prompt_entropy(torch.eye(4)) == pytest.approx(1)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0], [1.0, 2.0]])  # a right angle, then no step
    assert representation.curvature(corner) == pytest.approx(math.pi / 2)
    assert math.isnan(representation.prompt_entropy(torch.ones(1, 4)))
    assert math.isnan(representation.curvature(corner[:2]))
    far = torch.eye(6)
    assert representation.info_nce(far, far) == pytest.approx(math.log(1 + 10 * math.exp(-10)))  # of 11, one alike
    assert representation.info_nce(torch.ones(4, 3), torch.ones(4, 3)) == pytest.approx(math.log(7))


def test_invariance_compares_texts_with_a_view_that_has_other_tokens(model, batches):
    calls: list[dict[str, torch.Tensor]] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        calls.append({k: v.clone() for k, v in kwargs.items() if k != "labels"})

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    got = scored(model, "representation", batches, measure="invariance", noise=0.3)
    handle.remove()
    assert len(calls) == 2 * len(batches)
    views: list[list[np.ndarray]] = [[], []]
    for number, one in enumerate(calls):
        whole = calls[number - number % 2]["input_ids"]
        real, other = one["attention_mask"] != 0, whole != one["input_ids"]
        assert not (other & ~real).any()
        if number % 2:
            assert int(other.sum()) > 0 and (other.sum(1) <= (0.3 * real.sum(1)).ceil()).all()
            assert set(one["input_ids"][real].tolist()) <= set(whole[real].tolist())
        views[number % 2].append([[y.mean(0) for _, y in layer] for layer in texts(model, [one])])
    for layer in range(N):
        a, b = (np.array([t for v in side for t in v[layer]]) for side in views)
        z = np.concatenate([a, b])
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        losses = []
        for i in range(len(z)):
            rest = [math.exp(z[i] @ z[j] / 0.1) for j in range(len(z)) if j != i]
            losses.append(-math.log(math.exp(z[i] @ z[(i + len(a)) % len(z)] / 0.1) / sum(rest)))
        assert got[layer] == pytest.approx(1 - np.mean(losses) / math.log(len(z) - 1), rel=1e-5)


# ---- linearity, intrinsic dimension ----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["output", "change"])
def test_linearity(model, batches, of):
    want = []
    for layer in texts(model, batches):
        x, y = (np.concatenate([pair[side] for pair in layer]) for side in (0, 1))
        y = y - x if of == "change" else y
        x, y = x - x.mean(0), y - y.mean(0)
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        want.append(((x @ np.linalg.lstsq(x, y, rcond=None)[0] - y) ** 2).sum())
    assert min(want) > 1e-6
    assert scored(model, "linearity", batches, of=of) == pytest.approx(want, rel=1e-4)
    assert scored(model, "linearity", batches, of=of, first="low") == pytest.approx([-w for w in want], rel=1e-4)


def test_what_is_linear_and_too_few_tokens(model):
    draw = torch.Generator().manual_seed(0)
    x, linear = torch.randn(60, 5, generator=draw), torch.randn(5, 5, generator=draw)
    fit = linearity.start(request_of(model), linearity.Options())

    def of(y: torch.Tensor) -> float:
        return fit.value(fit.part(Passage(0, x[None], y[None])).double())

    assert of(x @ linear + 3) < 1e-12 and of(torch.ones(60, 5)) == 0 and of(torch.randn(60, 5, generator=draw)) > 0.7
    with pytest.raises(ScoreError, match=r"fits 33 tokens of width 32 exactly; give more than 33 in all"):
        scored(model, "linearity", [batch("llama", model, rows=3, length=11)])


@pytest.mark.parametrize("fit", ["likelihood", "regression"])
def test_intrinsic_dimension(model, batches, fit):
    want = []
    for layer in texts(model, batches):
        points = np.concatenate([y for _, y in layer])
        near = cKDTree(points).query(points, 3)[0]
        logs = np.sort(np.log(near[:, 2] / near[:, 1]))
        n = len(logs)
        shares = -np.log(1 - np.arange(1, n // 5 + 1) / n)
        slope = (logs[: n // 5] * shares).sum() / (logs[: n // 5] ** 2).sum()
        want.append(n / logs.sum() if fit == "likelihood" else slope)
    assert scored(model, "intrinsic_dimension", batches, fit=fit) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("fit", ["likelihood", "regression"])
def test_a_cube_in_a_larger_space_has_its_own_dimension_and_doubles_do_not_count(fit):
    draw = torch.Generator().manual_seed(0)
    cube = torch.rand(1200, 3, generator=draw) @ torch.randn(3, 20, generator=draw) + 10
    alone = intrinsic_dimension.dimension(cube, fit)
    assert alone == pytest.approx(3, rel=0.15)
    doubled = torch.cat([cube, cube[:1].repeat(50, 1)])
    assert intrinsic_dimension.dimension(doubled, fit) == pytest.approx(alone, rel=0.05)
    with pytest.raises(ScoreError, match=r"of 30 tokens 0 differ from all others, and 10 are needed"):
        intrinsic_dimension.dimension(torch.ones(30, 4), fit)


# ---- lens ------------------------------------------------------------------------------------------------------------


def soft(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum(-1).mean())


def ahead(one: dict[str, Any]) -> torch.Tensor:
    """Tokens whose next one has a label."""
    return torch.cat([one["labels"][:, 1:] != -100, torch.zeros(len(one["labels"]), 1, dtype=torch.bool)], 1)


@pytest.mark.parametrize("measure", ["top1", "kl"])
@pytest.mark.parametrize("form", ["gain", "agreement"])
def test_lens(model, batches, measure, form):
    read: list[list[np.ndarray]] = [[] for _ in range(N + 1)]
    for one in batches:
        seen = passages(model, one)
        for number, states in enumerate([seen[0][0], *(after for _, after in seen)]):
            with torch.no_grad():
                logits = model.lm_head(model.model.norm(states.float()))[ahead(one)]
            read[number].append(logits.double().numpy())
    answers = [np.concatenate(r) for r in read]
    final = answers[-1]
    if measure == "top1":
        levels = [float((a.argmax(-1) == final.argmax(-1)).mean()) for a in answers]
    else:
        levels = [-divergence(soft(final), soft(a)) for a in answers]
    want = [b - (a if form == "gain" else 0) for a, b in zip(levels, levels[1:], strict=False)]
    got = scored(model, "lens", batches, measure=measure, form=form)
    assert got == pytest.approx(want, abs=1e-6) and max(map(abs, got)) > 1e-4
    if form == "gain":
        assert sum(got) == pytest.approx(levels[-1] - levels[0], abs=1e-6)


# ---- removal ---------------------------------------------------------------------------------------------------------


def without(model: nn.Module, batches: list[dict[str, Any]], gone: set[int]) -> np.ndarray:
    """Logits of a model whose list of layers lacks these."""
    left = copy.deepcopy(model)
    left.model.layers = nn.ModuleList(b for i, b in enumerate(left.model.layers) if i not in gone)
    left.config.num_hidden_layers = len(left.model.layers)
    with torch.no_grad():
        found = [left(**one, use_cache=False).logits[ahead(one)] for one in batches]
    return torch.cat(found).double().numpy()


def js_of(a: np.ndarray, b: np.ndarray) -> float:
    p, q = soft(a), soft(b)
    return (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2


def angle_of(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean() / math.pi)


DISTANCES = {
    "js": js_of,
    "kl": lambda a, b: divergence(soft(a), soft(b)),
    "angular": angle_of,
    "norm": lambda a, b: float(np.linalg.norm(a - b, axis=-1).mean()),
}


def test_removal(model, batches):
    whole, parts = without(model, batches, set()), [without(model, batches, {i}) for i in range(N)]
    for distance, of in DISTANCES.items():
        want = [of(whole, part) for part in parts]
        assert scored(model, "removal", batches, distance=distance) == pytest.approx(want, rel=1e-4), distance


def test_greedy_removal(model, batches):
    whole = without(model, batches, set())
    gone: set[int] = set()
    moved, want = 0.0, {}
    while len(gone) < N:
        found = {i: js_of(whole, without(model, batches, gone | {i})) for i in range(N) if i not in gone}
        best = min(found, key=lambda i: found[i])
        moved = want[best] = max(moved, found[best])
        gone.add(best)
    got = scored(model, "removal", batches, greedy=True)
    assert got == pytest.approx([want[i] for i in range(N)], rel=1e-4)


def test_what_else_a_block_gives_out_stays_when_it_is_left_out():
    t5 = MODELS["t5"]().eval()
    one, block = batch("t5", t5, rows=4), t5.decoder.block[0]
    biases: list[torch.Tensor] = []
    handle = t5.decoder.block[2].register_forward_pre_hook(lambda _m, args: biases.append(args[2]))
    values = scored(t5, "removal", [one])
    handle.remove()
    assert all(v > 0 for v in values) and len(biases) == 5
    assert all(torch.equal(b, biases[0]) for b in biases) and biases[0].abs().max() > 0
    assert not block._forward_hooks and not block._forward_pre_hooks


def test_a_model_without_a_head_is_compared_by_its_last_states():
    bare = MODELS["llama_bare"]().eval()
    one = [batch("llama_bare", bare, rows=4)]
    assert all(v > 0 for v in scored(bare, "removal", one, distance="norm"))
    with pytest.raises(ScoreError, match="removal compares .* holds no logits"):
        scored(bare, "removal", one)


# ---- probe, language -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "form"), [("last", "accuracy"), ("mean", "gain")])
def test_probe(model, batches, pool, form):
    rows = [dict(one, classes=one["input_ids"][:, 0] % 3) for one in batches]
    y = torch.cat([one["classes"] for one in rows]).numpy()
    fold = np.empty(len(y), int)
    fold[np.argsort(y, kind="stable")] = np.arange(len(y)) % 3
    want = []
    for layer in texts(model, batches):
        right = []
        for side in (0, 1):
            x = np.stack([pair[side][-1] if pool == "last" else pair[side].mean(0) for pair in layer])
            hits = 0
            for number in range(3):
                inside = x[fold != number]
                damping = 0.5 * np.mean(((inside - inside.mean(0)) ** 2).sum(1))
                ridge = Ridge(damping).fit(inside, np.eye(3)[y[fold != number]])
                hits += (ridge.predict(x[fold == number]).argmax(1) == y[fold == number]).sum()
            right.append(hits / len(y))
        want.append(right[1] - (right[0] if form == "gain" else 0))
    got = scored(model, "probe", rows, pool=pool, form=form, folds=3, ridge=0.5)
    assert got == pytest.approx(want) and any(got)


def test_separable_classes_are_told_and_others_are_not():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 8, generator=draw), torch.arange(60) % 2
    assert probe.held_out(x + 3 * y[:, None], y) > 0.95
    assert 0.2 < probe.held_out(x, y) < 0.8
    assert probe.held_out(torch.ones(60, 8), y) == 0.5


def test_classes_that_are_none_are_told(model, batches):
    with pytest.raises(ScoreError, match=r"a batch has 4 texts and labels of the shape \(4, 12\); give every batch"):
        scored(model, "probe", batches)
    with pytest.raises(ScoreError, match=r"4 rows of 1 class\(es\); it needs 5 rows"):
        scored(model, "probe", [dict(batches[0], classes=torch.ones(4, dtype=torch.long))])


@pytest.mark.parametrize("measure", ["retrieval", "gap"])
def test_language(model, batches, measure):
    want = []
    for layer in texts(model, batches):
        z = [y.mean(0) / np.linalg.norm(y.mean(0)) for _, y in layer]
        a, b = z[::2], z[1::2]
        table = np.array([[p @ q for q in b] for p in a])
        n = len(a)
        hits = [table[i].argmax() == i for i in range(n)] + [table[:, i].argmax() == i for i in range(n)]
        gap = np.mean(np.diag(table)) - np.mean([table[i, j] for i in range(n) for j in range(n) if i != j])
        want.append(np.mean(hits) if measure == "retrieval" else gap)
    assert scored(model, "language", batches, measure=measure) == pytest.approx(want, abs=1e-6)


def test_translations_are_found():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20, 32, generator=draw) for _ in range(2))
    assert language.alikeness(a, a + 0.1 * b, "retrieval") == 1
    assert language.alikeness(a, a.roll(1, 0), "retrieval") == 0
    assert language.alikeness(torch.ones(5, 3), torch.ones(5, 3), "retrieval") == 0  # all alike is no hit
    assert abs(language.alikeness(a + 100, b + 100, "gap")) < 0.01  # a common direction alone


def test_rows_without_a_partner_are_told(model, batches):
    with pytest.raises(ScoreError, match=r"rows come in pairs .*a batch has 3"):
        scored(model, "language", [{k: v[:3] for k, v in batches[0].items()}])
    select = {"by": "language", "keep": 1}
    with pytest.raises(ScoreError, match=r"a trainer shuffles them; pass them as batches="):
        get_peft_model(llama(), LayerLoraConfig(select=select, r=2, target_modules="all-linear"))
    recipe: Any = SimpleNamespace(recipe=load_recipe("quickstart"))
    with pytest.raises(RecipeError, match="which a recipe's trainer shuffles.*by: scores.json"):
        batches_for(recipe, model, select)  # an arm of a comparison
