"""Every scorer: finite, deterministic, documented; and the values that the papers' definitions give."""

from __future__ import annotations

import math

import pytest
import torch

from layerpeft import Scores, layer_map, score_layers
from layerpeft.errors import ScoreError, SelectionError
from layerpeft.selection import plugins
from layerpeft.selection.scorers import outliers
from layerpeft.selection.scoring import Request
from tests.helpers.repeating import repeated
from tests.helpers.short import LAYERS

SCORERS = plugins.names("layerpeft.scorers")
OF_A_RUN = {"change"}  # scores nothing without the folder of an earlier run: tests/saving/test_change.py
TRAITS = {n: plugins.traits("layerpeft.scorers", n) for n in SCORERS}
BEFOREHAND = [n for n, t in TRAITS.items() if not t.live_only and "layer" in t.units and n not in OF_A_RUN]
OPTIONS = {"outliers": {"M": 4}, "probe": {"folds": 2}}
# tests/selection/test_scorers_forward.py asks the same of these, of every architecture
FORWARD = {"lens", "removal", "linearity", "intrinsic_dimension", "representation", "probe", "language"}


class Blocks(torch.nn.Module):
    """Two blocks of one linear each, with weights of the test's choosing: (out, in) each."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList()
        for weight in weights:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            self.blocks.append(torch.nn.Sequential(linear, torch.nn.Identity()))

    def forward(self, x):
        return {"loss": sum(block(x).square().mean() for block in self.blocks)}


@pytest.fixture
def llama(short):
    return short


def test_the_list_of_scorers():
    assert {"depth", "gradient_norm", "outliers", "random", "snr"} <= set(BEFOREHAND)
    assert {n for n, t in TRAITS.items() if t.live_only} == {"adapter_gradient", "importance"}
    below = {"routing", "head_scale"}  # experts alone, heads alone
    assert set(SCORERS) - set(BEFOREHAND) - OF_A_RUN == {"adapter_gradient", "importance"} | below


@pytest.mark.parametrize("by", [repeated(n) if n in FORWARD else n for n in BEFOREHAND])
def test_every_scorer_is_finite_deterministic_and_documented(llama, gsm8k_batches, by):
    more = {"classes": torch.tensor([0, 1])} if by == "probe" else {}

    def run():
        return score_layers(
            llama, by, batches=[b | more for b in gsm8k_batches[:2]], progress=False, **OPTIONS.get(by, {})
        )

    first, second = run(), run()
    assert first == second
    assert len(first.values) == LAYERS and all(math.isfinite(v) for v in first.values)
    assert first.fingerprint == layer_map(llama).fingerprint
    assert plugins.get("layerpeft.scorers", by).__doc__


@pytest.mark.parametrize(("M", "percent"), [(3, 5.0), (5, 5.0), (13, 0.0)])
def test_layer_outlier_distribution_golden_value(M, percent):
    # 19 ones and one 30: 5 % at M = 3 and 5, nothing at M = 13 (the second layer only keeps the scores from being all zero)
    ones = torch.ones(4, 5)
    ones[2, 3] = 30.0
    spike = torch.full((1, 100), 0.01)
    spike[0, 0] = 100.0
    model = Blocks(ones, spike)
    layers = layer_map(model)
    request = Request(model, layers, layers.targets)
    got = outliers.score(request, outliers.Options(M=M, activations=False))
    assert got.values[0] == pytest.approx(percent)
    assert got.values[1] == pytest.approx(1.0)


def test_outliers_follow_their_definition_over_a_whole_layer(llama, gsm8k_batches):
    batches = gsm8k_batches[:3]
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        llama.get_submodule(t.name).register_forward_hook(
            lambda _m, args, _y, name=t.name: inputs.setdefault(name, []).append(args[0].detach().flatten(0, -2))
        )
        for t in layer_map(llama).targets
    ]
    llama.eval()
    with torch.no_grad():
        for batch in batches:
            llama(**batch)
    for handle in handles:
        handle.remove()
    want = []
    for layer in layer_map(llama).layers:
        parts = [
            (torch.cat(inputs[t.name]).norm(dim=0) * llama.get_submodule(t.name).weight.abs()).flatten()
            for t in layer.targets
        ]
        a = torch.cat(parts)
        want.append(100 * float((a > 5 * a.mean()).sum()) / a.numel())
    got = score_layers(llama, "outliers", batches=batches, M=5, target_modules="all-linear", progress=False)
    assert got.values == pytest.approx(want, abs=1e-3)


def test_all_zero_outlier_scores_name_a_lower_M():
    model = Blocks(torch.ones(6, 6), torch.ones(6, 6) + torch.eye(6))
    with pytest.raises(ScoreError, match=r"at M = 13: the largest is 1\.7 times.*for example M: 1\.\d"):
        score_layers(model, "outliers", activations=False, target_modules="all-linear")


def test_the_weight_only_form_is_never_chosen_by_itself(llama):
    with pytest.raises(SelectionError, match="pass batches="):
        score_layers(llama, "outliers", M=3)
    assert score_layers(llama, "outliers", M=3, activations=False).options["activations"] is False


def test_random_draws_differ_by_seed_and_not_by_global_state(llama):
    torch.manual_seed(1)
    a = score_layers(llama, "random", seed=1)
    torch.manual_seed(2)
    assert score_layers(llama, "random", seed=1) == a
    assert score_layers(llama, "random", seed=2).values != a.values
    assert all(0 < v <= 1 for v in a.values)


def test_empty_batches_and_wrong_batches_are_errors(llama):
    with pytest.raises(ScoreError, match="batches is empty"):
        score_layers(llama, batches=iter([]), progress=False)
    with pytest.raises(ScoreError, match="must be a mapping"):
        score_layers(llama, batches=[torch.ones(1, 3)], progress=False)


def test_non_finite_scores_are_refused_by_layer():
    with pytest.raises(ScoreError, match=r"not finite for layer\(s\) 1, 2"):
        Scores((1.0, math.nan, math.inf), by="x", fingerprint="f", stack="s")


def test_scores_survive_json_and_refuse_another_architecture(llama, tmp_path):
    scores = score_layers(llama, "random", seed=5)
    scores.save(tmp_path / "scores.json")
    again = Scores.load(tmp_path / "scores.json")
    assert again == scores and again.ranked() == scores.ranked()
    again.check(layer_map(llama))
    with pytest.raises(ScoreError, match=f"hold {LAYERS} layers"):
        again.check(layer_map(Blocks(torch.ones(2, 2), torch.ones(2, 2))))
    other = Scores.from_dict(scores.to_dict() | {"fingerprint": "0" * 64})
    with pytest.raises(ScoreError, match="names or shapes of its targets differ"):
        other.check(layer_map(llama))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "holds no scores"),
        ('{"format": 9}', "format 1"),
        ('{"format": 1, "by": "x"}', "needs the keys"),
    ],
)
def test_broken_score_files_are_named(tmp_path, text, message):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ScoreError, match=message):
        Scores.load(path)
    with pytest.raises(ScoreError, match="no scores file"):
        Scores.load(tmp_path / "absent.json")


def test_ties_break_by_index():
    assert Scores((1.0, 2.0, 2.0, 0.5), by="x", fingerprint="f", stack="s").ranked() == (1, 2, 0, 3)
