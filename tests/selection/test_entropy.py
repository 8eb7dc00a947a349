"""Activation entropy: clusters as scikit-learn finds them, which tokens are sampled, and processes that agree on the sample."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.cluster import KMeans

from layerpeft import layer_map, score_layers
from layerpeft.errors import ScoreError
from layerpeft.selection.scorers import entropy
from layerpeft.selection.scoring import Request
from tests.helpers.models import MODELS, batch
from tests.helpers.together import Group


def request_of(model, **more) -> Request:
    layers = layer_map(model)
    return Request(model, layers, layers.targets, **more)


# ---- entropy ---------------------------------------------------------------------------------------------------------


def blobs(sizes, width: int = 6, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    centres = 100 * torch.eye(len(sizes), width)
    rows = torch.cat([c + torch.randn(n, width, generator=draw) for c, n in zip(centres, sizes, strict=True)])
    return rows[torch.randperm(len(rows), generator=draw)]


@pytest.mark.parametrize("sizes", [(50, 50), (10, 40, 150), (5, 5, 5, 85)])
def test_separated_clusters_are_found_as_scikit_learn_finds_them(sizes):
    rows = blobs(sizes)
    labels = KMeans(len(sizes), n_init=10, random_state=0).fit(rows.numpy()).labels_
    shares = [float((labels == k).mean()) for k in range(len(sizes))]
    want = -sum(p * math.log(p) for p in shares)
    for seed in range(5):
        found = entropy.cluster_sizes(rows, len(sizes), seed)
        assert sorted(found) == sorted(sizes)
        assert entropy.size_entropy(found) == pytest.approx(want)


def test_overlapping_clusters_are_about_as_tight_as_scikit_learn_s():
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    want = [entropy.size_entropy(torch.bincount(torch.tensor(KMeans(20, n_init=1, random_state=s).fit(rows.numpy()).labels_)).tolist()) for s in range(3)]  # fmt: skip  # noqa: E501
    got = [entropy.size_entropy(entropy.cluster_sizes(rows, 20, s)) for s in range(3)]
    assert sum(got) / 3 == pytest.approx(sum(want) / 3, abs=0.06)
    assert all(g < math.log(20) for g in got)


def test_few_and_equal_points():
    assert entropy.cluster_sizes(torch.ones(7, 3), 4) == [7]
    assert sorted(entropy.cluster_sizes(torch.tensor([[0.0], [9.0], [9.0]]), 100)) == [1, 2]
    assert entropy.size_entropy([7]) == 0.0
    assert entropy.size_entropy([4, 0, 4]) == pytest.approx(math.log(2))


def test_padding_does_not_count(llama, gsm8k_batches):
    one = {k: v.clone() for k, v in gsm8k_batches[0].items()}
    one["attention_mask"][0, 50:] = one["attention_mask"][1, :9] = 0
    measurement = entropy.start(request_of(llama, outer=llama), entropy.Options(tokens=10_000))
    measurement.attach()
    llama.eval()
    with torch.no_grad():
        states = llama(**one, output_hidden_states=True).hidden_states
    measurement.next_batch()
    measurement.detach()
    sample = measurement._kept[2]
    want = states[3][one["attention_mask"] != 0]
    assert sample.rows.shape == want.shape
    order = measurement._kept[2].rows.sum(1).argsort()
    assert torch.equal(sample.rows[order], want[want.sum(1).argsort()])


def test_the_sample_is_bounded_the_same_tokens_in_all_layers_and_spread_over_batches(llama, gsm8k_batches):
    measurement = entropy.start(request_of(llama, seed=3), entropy.Options(clusters=10, tokens=60))
    measurement.attach()
    llama.eval()
    seen = []
    for one in gsm8k_batches[:4]:
        with torch.no_grad():
            seen.append(llama(**one, output_hidden_states=True).hidden_states)
        measurement.next_batch()
        assert all(s.rows.shape == (60, 192) for s in measurement._kept.values())
    measurement.detach()
    keys = measurement._kept[0].keys
    assert all(torch.equal(s.keys, keys) for s in measurement._kept.values())
    assert torch.equal(keys, keys.sort().values) and keys.max() < 0.3
    from_batch = [
        int((torch.cdist(measurement._kept[5].rows, s[6].flatten(0, 1)).min(1).values < 1e-4).sum()) for s in seen
    ]
    assert all(n >= 5 for n in from_batch), "a batch is hardly in the sample"
    a = score_layers(llama, "entropy", batches=gsm8k_batches[:4], clusters=10, tokens=60, seed=3, progress=False)
    assert a.values == measurement.result().values
    b = score_layers(llama, "entropy", batches=gsm8k_batches[:4], clusters=10, tokens=60, seed=4, progress=False)
    assert a.values != b.values
    assert all(0 < v <= math.log(10) for v in a.values)


def test_blocks_that_are_never_called_are_named():
    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) for _ in range(2)
            )

        def forward(self, x):
            return {"loss": self.blocks[0](x).sum()}

    with pytest.raises(ScoreError, match=r"1 layer\(s\) gave out nothing to cluster: blocks.1"):
        score_layers(Idle(), "entropy", batches=[{"x": torch.ones(3, 4)}], target_modules="all-linear", progress=False)


@pytest.mark.parametrize("tokens", [20, 10_000])
def test_processes_agree_on_one_sample_of_all_they_have_seen(monkeypatch, tokens):
    models = [MODELS["llama"]() for _ in range(2)]
    group = Group(monkeypatch, 2)

    def run(rank: int):
        measurement = entropy.start(request_of(models[rank]), entropy.Options(clusters=5, tokens=tokens))
        measurement.attach()
        with torch.no_grad():
            for number in range(2 + rank):
                models[rank].eval()(**batch("llama", models[rank], seed=10 * rank + number))
                measurement.next_batch()
        measurement.detach()
        own = measurement._kept[1]
        measurement.combine(group.add)
        return own, measurement._kept[1], measurement.result()

    (own_a, all_a, a), (own_b, all_b, b) = group.run(run)
    assert a == b and torch.equal(all_a.rows, all_b.rows)
    assert all_a.rows.shape[0] == min(tokens, (2 + 3) * 16)
    keys = torch.cat([own_a.keys, own_b.keys])
    order = keys.argsort()[: all_a.rows.shape[0]]
    assert torch.equal(all_a.rows, torch.cat([own_a.rows, own_b.rows])[order])
