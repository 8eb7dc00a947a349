"""Sharing out bits: golden cases, every small case against brute force, and what has to hold for any units and budget."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpeft.errors import ConfigError, ScoreError
from layerpeft.model.precisions import KEPT, PRECISIONS, Storage, stored_bytes
from layerpeft.quantization import budget as allocate
from layerpeft.quantization.budget import Unit, total_bytes, total_loss

CHOICES = ("hqq2", "hqq3", "nf4", "int8", KEPT)
LADDER = ("hqq2", "hqq3", "nf4")
SIMPLE = {"hqq2": 2, "hqq3": 3, "nf4": 4}  # bytes of eight weights


def unit(name: str, score: float, rows: int = 64, columns: int = 64, choices=CHOICES) -> Unit:
    costs = {c: stored_bytes(c, rows, columns, Storage()) for c in choices}
    return Unit(name, (f"{name}.a", f"{name}.b"), rows * columns, score, costs)


def simple(*scores: float) -> list[Unit]:
    return [Unit(f"u{i}", (f"u{i}",), 8, s, SIMPLE) for i, s in enumerate(scores)]


def all_of(units, choices):
    return (
        dict(zip([u.name for u in units], bits, strict=True))
        for bits in itertools.product(*[[c for c in choices if c in u.costs] for u in units])
    )


def best(units, choices, budget, losses) -> float:
    fitting = (b for b in all_of(units, choices) if total_bytes(units, b) <= budget)
    return min(total_loss(b, losses) for b in fitting)


# ---- what bits cost in loss ------------------------------------------------------------------------------------------


def test_each_bit_quarters_the_predicted_loss_and_what_is_kept_loses_nothing():
    found = allocate.losses([unit("a", 2.0)], CHOICES)["a"]
    assert found == {"hqq2": 2 / 16, "hqq3": 2 / 64, "nf4": 2 / 256, "int8": 2 / 65536, KEPT: 0.0}


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ((0.0, 0.0), "all of them are 0"),
        ((1.0, -0.5), r"numbers from 0, which 1 of 2 are not: u1 \(-0.5\)"),
        ((math.nan, 1.0), r"u0 \(nan\)"),
    ],
)
def test_scores_that_cannot_share_out_are_refused(scores, says):
    with pytest.raises(ScoreError, match=says):
        allocate.losses(simple(*scores), LADDER)
    with pytest.raises(ScoreError, match=says):
        allocate.paired(simple(*scores), "hqq3", "hqq2", "nf4", 100, lambda bits: 0.0)


# ---- greedy ----------------------------------------------------------------------------------------------------------


def test_the_step_with_the_largest_fall_per_byte_comes_first():
    units = simple(1.0, 16.0)
    predicted = allocate.losses(units, LADDER)
    # falls per byte: u1 hqq2 -> hqq3 .75, hqq3 -> nf4 .1875; u0 .047, .012
    at = [allocate.greedy(units, LADDER, budget, predicted) for budget in (4, 5, 6, 7, 8)]
    assert [tuple(b.values()) for b in at] == [
        ("hqq2", "hqq2"),
        ("hqq2", "hqq3"),
        ("hqq2", "nf4"),
        ("hqq3", "nf4"),
        ("nf4", "nf4"),
    ]


def test_ties_go_to_the_unit_that_stands_first():
    units = simple(3.0, 3.0, 3.0)
    bits = allocate.greedy(units, LADDER, 8, allocate.losses(units, LADDER))
    assert list(bits.values()) == ["hqq3", "hqq3", "hqq2"]


def test_a_step_may_skip_precisions_where_that_is_the_better_slope():
    units = simple(1.0, 1.0)
    table = {"u0": {"hqq2": 10.0, "hqq3": 9.9, "nf4": 0.0}, "u1": {"hqq2": 4.0, "hqq3": 1.0, "nf4": 0.5}}
    # u0: .1 for one byte, but 10 for two (5 a byte), which beats u1's 3
    assert allocate.greedy(units, LADDER, 6, table) == {"u0": "nf4", "u1": "hqq2"}
    assert allocate.greedy(units, LADDER, 5, table) == {"u0": "hqq2", "u1": "hqq3"}, "two bytes do not fit there"


def test_a_precision_that_costs_more_and_loses_more_is_never_taken():
    units = simple(1.0)
    table = {"u0": {"hqq2": 1.0, "hqq3": 2.0, "nf4": 1.5}}
    assert allocate.greedy(units, LADDER, 100, table) == {"u0": "hqq2"}


def test_a_budget_below_the_cheapest_choice_names_the_bytes():
    units = [unit("a", 1.0), unit("b", 2.0)]
    needed = 2 * stored_bytes("hqq2", 64, 64, Storage())
    with pytest.raises(ConfigError, match=rf"budget of 2,000 bytes \(1.95 bits.*takes {needed:,} bytes \(2.50 bits"):
        allocate.greedy(units, CHOICES, 2000, allocate.losses(units, CHOICES))
    assert allocate.greedy(units, CHOICES, needed, allocate.losses(units, CHOICES)) == {"a": "hqq2", "b": "hqq2"}


def test_units_that_fit_nothing_and_losses_that_are_missing_are_named():
    units = [unit("a", 1.0), unit("b", 1.0, choices=("int8",))]
    with pytest.raises(ConfigError, match="b can be stored in none of hqq2, nf4"):
        allocate.greedy(units, ("hqq2", "nf4"), 10**6, {})
    with pytest.raises(ConfigError, match="two units have the name a"):
        allocate.greedy([units[0], units[0]], CHOICES, 10**6, {})
    with pytest.raises(ScoreError, match="none are given for a \\(there are some for aa\\)"):
        allocate.greedy(units, CHOICES, 10**6, {"aa": {}, "b": {"int8": 0.0}})
    with pytest.raises(ScoreError, match="a has no finite one in hqq3"):
        allocate.greedy(units[:1], ("hqq2", "hqq3"), 10**6, {"a": {"hqq2": 1.0, "hqq3": math.inf}})


# losses from 0 to 100 on a grid: of two that differ by the last bit of a denormal number the fall per byte is 0 in float64
LOSSES = st.integers(0, 100 * 2**20).map(lambda n: n / 2**20)
costs_and_losses = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=4, max_size=4), st.lists(LOSSES, min_size=4, max_size=4)),
    min_size=1,
    max_size=4,
)
NAMES = ("hqq2", "hqq3", "nf4", "int8")


def built(drawn):
    units = [Unit(f"u{i}", (f"u{i}",), 8, 1.0, dict(zip(NAMES, c, strict=True))) for i, (c, _) in enumerate(drawn)]
    return units, {f"u{i}": dict(zip(NAMES, v, strict=True)) for i, (_, v) in enumerate(drawn)}


@settings(max_examples=150, deadline=None)
@given(costs_and_losses, st.integers(0, 60), st.integers(0, 20))
def test_for_any_units_the_budget_holds_more_of_it_never_hurts_and_the_best_is_less_than_a_step_away(
    drawn, extra, more
):
    units, table = built(drawn)
    least = sum(min(u.costs.values()) for u in units)
    bits = allocate.greedy(units, NAMES, least + extra, table)
    assert set(bits) == {u.name for u in units} and all(bits[u.name] in u.costs for u in units)
    assert allocate.total_bytes(units, bits) <= least + extra
    found = allocate.total_loss(bits, table)
    assert allocate.total_loss(allocate.greedy(units, NAMES, least + extra + more, table), table) <= found + 1e-9
    largest = max(max(v.values()) - min(v.values()) for v in table.values())
    assert best(units, NAMES, least + extra, table) - 1e-9 <= found
    assert found <= best(units, NAMES, least + extra, table) + largest + 1e-9


@settings(max_examples=60, deadline=None)
@given(costs_and_losses)
def test_along_the_convex_hull_greedy_is_the_best_there_is_for_its_bytes(drawn):
    """Where every step fits, loss + λ · bytes is least for the λ of the last step, so nothing of these bytes is better."""
    units, table = built(drawn)
    start = allocate.greedy(units, NAMES, sum(min(u.costs.values()) for u in units), table)
    hulls = [steps_of(u, table[u.name], start[u.name]) for u in units]
    spent = allocate.total_bytes(units, start)
    for slope, cost in sorted((s for hull in hulls for s in hull), reverse=True):
        assert slope > 0
        spent += cost
        found = allocate.total_loss(allocate.greedy(units, NAMES, spent, table), table)
        assert found == pytest.approx(best(units, NAMES, spent, table), abs=1e-9)


def steps_of(unit: Unit, own, at: str) -> list[tuple[float, int]]:
    """(fall per byte, bytes) of the steps of a unit's lower convex hull."""
    found = []
    while True:
        higher = [(-(own[at] - own[c]) / (unit.costs[c] - unit.costs[at]), unit.costs[c], c) for c in NAMES
                  if unit.costs[c] > unit.costs[at] and own[c] < own[at]]  # fmt: skip
        if not higher:
            return found
        slope, cost, c = min(higher)
        found.append((-slope, cost - unit.costs[at]))
        at = c


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.floats(2.5, 16))
def test_with_the_true_bytes_of_storage_and_predicted_losses(scores, asked):
    units = [unit(f"u{i}", s, 64, 64 * (1 + i % 3)) for i, s in enumerate(scores)]
    predicted = allocate.losses(units, CHOICES)
    budget = int(asked * sum(u.weights for u in units) / 8)
    bits = allocate.greedy(units, CHOICES, budget, predicted)
    assert allocate.mean_bits(units, bits) <= asked
    assert bits == allocate.greedy(units, CHOICES, budget, predicted)
    unfit = [u.costs[c] - u.costs[bits[u.name]] for u in units for c in CHOICES if u.costs[c] > u.costs[bits[u.name]]]
    assert all(allocate.total_bytes(units, bits) + more > budget for more in unfit), "something would still fit"


# ---- paired ----------------------------------------------------------------------------------------------------------


def test_the_lowest_go_down_and_the_highest_go_up_as_far_as_the_judge_says():
    units = simple(5.0, 1.0, 9.0, 2.0, 7.0)
    seen = []

    def judge(bits):
        downs = sum(b == "hqq2" for b in bits.values())
        assert downs == sum(b == "nf4" for b in bits.values())
        seen.append(downs)
        return abs(downs - 1)

    bits = allocate.paired(units, "hqq3", "hqq2", "nf4", 15, judge)
    assert seen == [0, 1, 2]
    assert bits == {"u0": "hqq3", "u1": "hqq2", "u2": "nf4", "u3": "hqq3", "u4": "hqq3"}
    assert allocate.total_bytes(units, bits) == 15


def test_predicted_losses_judge_like_brute_force_over_the_pairs():
    units = simple(0.5, 100.0, 3.0, 40.0, 0.1, 7.0)
    predicted = allocate.losses(units, LADDER)
    pairings = allocate.pairings(units, "hqq3", "hqq2", "nf4", 18)
    assert len(pairings) == 4
    bits = allocate.paired(units, "hqq3", "hqq2", "nf4", 18, lambda b: allocate.total_loss(b, predicted))
    assert allocate.total_loss(bits, predicted) == min(allocate.total_loss(b, predicted) for b in pairings)
    assert allocate.greedy(units, LADDER, 18, predicted) == bits, "here the pairs hold the best there is"


def test_pairs_over_the_budget_are_passed_over_and_tries_spread_evenly():
    units = [
        Unit(f"u{i}", (), 8, i + 1.0, {"hqq2": 2, "hqq3": 3, "nf4": 5}) for i in range(8)
    ]  # up costs 2, down saves 1
    assert len(allocate.pairings(units, "hqq3", "hqq2", "nf4", 24)) == 1
    assert len(allocate.pairings(units, "hqq3", "hqq2", "nf4", 26)) == 3
    few = allocate.pairings(units, "hqq3", "hqq2", "nf4", 100, tries=3)
    assert [sum(b == "nf4" for b in bits.values()) for bits in few] == [0, 2, 4]
    with pytest.raises(ConfigError, match="takes 24 bytes"):
        allocate.pairings(units, "hqq3", "hqq2", "nf4", 23)


def test_a_ladder_that_does_not_go_up_is_refused():
    with pytest.raises(ConfigError, match="each step up has to take more bytes.*nf4 4, hqq3 3"):
        allocate.pairings(simple(1.0, 2.0), "hqq3", "nf4", "hqq2", 100)
    with pytest.raises(ConfigError, match="b cannot be stored in hqq2, hqq3"):
        allocate.pairings([unit("a", 1.0), unit("b", 2.0, choices=("nf4",))], "hqq3", "hqq2", "nf4", 10**6)


# ---- lowest first ----------------------------------------------------------------------------------------------------


def test_units_of_the_lowest_scores_are_lowered_one_after_another_until_the_budget_is_met():
    units = simple(5.0, 1.0, 9.0, 1.0, 7.0)
    lowered = [sorted(n for n, b in allocate.lowest_first(units, "hqq2", "nf4", 20 - k).items() if b == "hqq2") for k in (0, 1, 2, 3, 5)]  # fmt: skip  # noqa: E501
    assert lowered == [[], ["u1"], ["u1"], ["u1", "u3"], ["u0", "u1", "u3"]]
    with pytest.raises(ConfigError, match="takes 10 bytes"):
        allocate.lowest_first(units, "hqq2", "nf4", 9)
    with pytest.raises(ConfigError, match="each step up has to take more bytes.*nf4 4, hqq2 2"):
        allocate.lowest_first(units, "nf4", "hqq2", 100)
    with pytest.raises(ScoreError, match="not finite give no order: u1"):
        allocate.lowest_first(simple(0.0, math.nan), "hqq2", "nf4", 100)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 40), st.integers(1, 40)), min_size=1), st.floats(0, 1))
def test_no_unit_is_lowered_before_one_of_a_lower_score_nor_without_need(drawn, share):
    units = [Unit(f"u{i}", (), 8, s, {"hqq2": a, "nf4": a + b}) for i, (s, a, b) in enumerate(drawn)]
    least, most = (sum(u.costs[c] for u in units) for c in ("hqq2", "nf4"))
    budget = least + int(share * (most - least))
    bits = allocate.lowest_first(units, "hqq2", "nf4", budget)
    order = sorted(units, key=lambda u: u.score)
    lowered = [u for u in order if bits[u.name] == "hqq2"]
    assert lowered == order[: len(lowered)] and total_bytes(units, bits) <= budget
    assert not lowered or total_bytes(units, {**bits, lowered[-1].name: "nf4"}) > budget


def test_units_become_modules():
    units = [unit("a", 1.0), unit("b", 2.0)]
    bits = {"a": "nf4", "b": "int8"}
    assert allocate.by_module(units, bits) == {"a.a": "nf4", "a.b": "nf4", "b.a": "int8", "b.b": "int8"}
    assert all(c in PRECISIONS for c in bits.values())
