"""Rules that choose again: the shares they give to layers, what they depend on, and the published faults beside ours."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from layerpeft.errors import SelectionError
from layerpeft.model.layers import layer_map
from layerpeft.selection import plugins
from layerpeft.selection.draws import window_seed
from layerpeft.selection.picks import adaptive, cycle, dirichlet, ir_tuning, sample, sigmoid, split, uniform
from layerpeft.selection.schedule import Taken, Turn, schedule_of, take, turn_of
from layerpeft.selection.select import Select

RULES = {n: plugins.get("layerpeft.picks", n) for n in plugins.names("layerpeft.picks")}
TRAITS = {n: plugins.traits("layerpeft.picks", n) for n in RULES}
AGAIN = sorted({"adaptive", "uniform"} | {n for n, rule in RULES.items() if hasattr(rule, "again")})


def turn(window: int = 0, keep: int | None = 2, scores=(3.0, 1.0, 2.0, 0.5, 0.1), seed: int = 0, **more) -> Turn:
    return Turn(window, window_seed(seed, window), keep, tuple(scores), base_seed=seed, **more)


def again(rule, t: Turn, options) -> Taken:
    """As a schedule asks: a rule without a form of its own for windows picks, by the window's seed."""
    if hasattr(rule, "again"):
        return rule.again(t, options)
    return Taken(tuple(rule.pick(t.scores, t.keep, t.seed, options)), t.state)


def shares(rule, options, windows: int = 4000, **more) -> list[float]:
    """How often each layer is in a window, over many windows."""
    counts = [0] * 5
    for window in range(windows):
        for i in again(rule, turn(window, **more), options).positions:
            counts[i] += 1
    return [c / windows for c in counts]


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGAIN)
def test_a_choice_depends_on_the_turn_alone(name):
    rule = RULES[name]
    keep = None if TRAITS[name].decides else 2
    turns = [turn(w, keep, seed=3, counts=(1, 2, 3, 4, 5)) for w in range(30)]
    random.seed(1)
    first = [again(rule, t, rule.Options()) for t in turns]
    random.seed(2)
    state = random.getstate()
    assert [again(rule, t, rule.Options()) for t in reversed(turns)] == first[::-1]
    assert random.getstate() == state
    for taken in first:
        assert len(set(taken.positions)) == len(taken.positions) and set(taken.positions) <= set(range(5))


@pytest.mark.parametrize("name", ["uniform", "cycle", "adaptive", "dirichlet"])
def test_another_seed_and_another_window_draw_otherwise(name):
    rule, options = RULES[name], RULES[name].Options()
    runs = [tuple(again(rule, turn(w, seed=s), options).positions for w in range(40)) for s in range(8)]
    assert len(set(runs)) == 8
    assert all(len(set(run)) > 3 for run in runs)


def test_rules_say_what_they_need():
    assert {n for n, t in TRAITS.items() if t.scoreless} == {"uniform", "cycle"}
    assert {n for n, t in TRAITS.items() if t.again_only} == {"cycle", "dirichlet", "grow", "ir_tuning"}
    assert {n for n, r in RULES.items() if not hasattr(r, "pick")} == {"cycle", "dirichlet", "grow", "ir_tuning"}
    assert {n for n, t in TRAITS.items() if t.decides} == {"split", "ir_tuning"}


@pytest.mark.parametrize("name", ["uniform", "adaptive"])
def test_a_rule_that_only_picks_picks_anew_in_every_window(name, llama):
    rule, select = RULES[name], Select.parse({"by": "depth", "pick": name, "keep": 2, "reselect_steps": 10, "seed": 9})
    layers = layer_map(llama)
    schedule = schedule_of(select, layers, layers.targets)
    for window in (0, 5):
        t = turn_of(select, schedule, window, [float(i) for i in range(12)], (), (), {})
        assert list(take(select, schedule, t).positions) == sorted(rule.pick(t.scores, 2, t.seed, rule.Options()))
        assert t.seed == window_seed(9, window)


def test_a_schedule_tells_the_seed_of_its_own(llama):
    select = Select.parse({"pick": "cycle", "keep": 5, "reselect_steps": 10, "seed": 4})
    layers = layer_map(llama)
    schedule = schedule_of(select, layers, layers.targets)
    turns = [turn_of(select, schedule, w, (), (), (), {}) for w in range(6)]
    assert {t.base_seed for t in turns} == {4} and len({t.seed for t in turns}) == 6
    blocks = [take(select, schedule, t).positions for t in turns]
    assert sorted(i for b in blocks[:3] for i in b) == sorted(i for b in blocks[3:] for i in b) == list(range(12))


# ---- uniform (LISA) -------------------------------------------------------------------------------------------------


def test_uniform_gives_every_layer_the_same_share_whatever_the_scores():
    assert shares(uniform, uniform.Options()) == pytest.approx([0.4] * 5, abs=0.025)
    assert uniform.pick([1.0] * 4, None, 0, uniform.Options()) != uniform.pick([1.0] * 4, None, 1, uniform.Options())
    assert sorted(uniform.pick([1.0] * 4, None, 0, uniform.Options())) == [0, 1, 2, 3]


def test_windows_to_cover_32_layers():
    """Two of 32: 62 windows on average until every layer was active, five: 24."""
    for keep, want in ((2, 62), (5, 24)):
        total = 0
        for seed in range(150):
            seen: set[int] = set()
            window = 0
            while len(seen) < 32:
                seen |= set(again(uniform, turn(window, keep, [0.0] * 32, seed), uniform.Options()).positions)
                window += 1
            total += window
        assert total / 150 == pytest.approx(want, rel=0.08)


# ---- cycle (BAdam) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["permutation", "ascending", "descending"])
@pytest.mark.parametrize(("count", "keep"), [(12, 1), (12, 5), (5, 2), (7, 7), (6, 3)])
def test_every_layer_once_per_round(order, count, keep):
    options = cycle.Options(order)
    windows = math.ceil(count / keep)
    for number in range(4):
        blocks = [
            cycle.again(turn(number * windows + i, keep, [0.0] * count, 5), options).positions for i in range(windows)
        ]
        assert sorted(i for b in blocks for i in b) == list(range(count))
        assert [len(b) for b in blocks[:-1]] == [keep] * (windows - 1) and len(blocks[-1]) == count - keep * (
            windows - 1
        )


def test_orders_of_a_cycle():
    def flat(order, seed=0, start=0):
        return [cycle.again(turn(start + w, 1, [0.0] * 6, seed), cycle.Options(order)).positions[0] for w in range(6)]

    assert flat("ascending") == flat("ascending", 3, 6) == [0, 1, 2, 3, 4, 5]
    assert flat("descending") == [5, 4, 3, 2, 1, 0]
    rounds = [tuple(flat("permutation", seed, 6 * n)) for seed in range(3) for n in range(4)]
    assert len(set(rounds)) == 12
    first = [flat("permutation", seed)[0] for seed in range(3000)]
    assert [first.count(i) / 3000 for i in range(6)] == pytest.approx([1 / 6] * 6, abs=0.025)
    assert sorted(cycle.again(turn(3, None), cycle.Options()).positions) == [0, 1, 2, 3, 4]


# ---- adaptive (GRASS) -----------------------------------------------------------------------------------------------


def test_adaptive_probabilities_and_their_long_run():
    scores = (3.0, 1.0, 0.0, 0.0, 0.0)
    p = adaptive.probabilities(scores, adaptive.Options())
    assert p == pytest.approx([0.8 * 0.75 + 0.04, 0.8 * 0.25 + 0.04, 0.04, 0.04, 0.04]) and sum(p) == pytest.approx(1)
    assert shares(adaptive, adaptive.Options(), scores=scores, keep=1) == pytest.approx(p, abs=0.02)


def test_the_floor_reaches_layers_that_sampling_by_score_never_draws():
    scores = (3.0, 1.0, 2.0, 0.0, 0.0)
    drawn = {i for s in range(500) for i in sample.pick(scores, 2, s, sample.Options())}
    assert drawn == {0, 1, 2}
    options = adaptive.Options(floor=0.5)
    got = shares(adaptive, options, scores=scores, keep=1)
    assert min(got) > 0.08 and got[3:] == pytest.approx([0.1, 0.1], abs=0.02)


def test_adaptive_without_evidence_is_uniform():
    assert adaptive.probabilities([0.0] * 4, adaptive.Options()) == [0.25] * 4
    assert adaptive.probabilities([5.0, 1.0], adaptive.Options(floor=1.0)) == [0.5, 0.5]
    assert shares(adaptive, adaptive.Options(), scores=[0.0] * 5) == pytest.approx([0.4] * 5, abs=0.025)
    with pytest.raises(SelectionError, match="negative"):
        adaptive.pick([-1.0, 1.0], 1, 0, adaptive.Options())
    with pytest.raises(SelectionError, match=r"floor: 1\.5 is above 1"):
        adaptive.pick([1.0, 1.0], 1, 0, adaptive.Options(floor=1.5))


# ---- sigmoid (IST) --------------------------------------------------------------------------------------------------


def test_sigmoid_weights_scores_of_either_sign():
    scores = (2.0, 0.0, -2.0)
    first = [sigmoid.pick(scores, 1, s, sigmoid.Options())[0] for s in range(4000)]
    weights = [1 / (1 + math.exp(-s)) for s in scores]
    want = [w / sum(weights) for w in weights]
    assert [first.count(i) / 4000 for i in range(3)] == pytest.approx(want, abs=0.025)
    assert sorted(sigmoid.pick(scores, None, 0, sigmoid.Options())) == [0, 1, 2]


# ---- dirichlet (AdaGradSelect) --------------------------------------------------------------------------------------


def test_dirichlet_begins_greedy_and_ends_with_the_counts():
    options = dirichlet.Options(eps=1.0, eps_decay=0.05)
    assert dirichlet.again(turn(0), options).positions == (0, 2)  # eps_0 = 1
    greedy = [
        w for w in range(300) for s in range(20) if set(dirichlet.again(turn(w, seed=s), options).positions) == {0, 2}
    ]
    for start, end in ((0, 5), (20, 30)):
        eps = sum(math.exp(-0.05 * w) for w in range(start, end)) / (end - start)
        share = sum(start <= w < end for w in greedy) / (20 * (end - start))
        # with equal counts every pair of five has a tenth of the rest
        assert share == pytest.approx(eps + (1 - eps) * 0.1, abs=0.1)
    late = dirichlet.Options(eps=1e-9, prior=1.0)
    got = shares(dirichlet, late, keep=1, counts=(0, 3, 0, 5, 1))
    assert got == pytest.approx([1 / 14, 4 / 14, 1 / 14, 6 / 14, 2 / 14], abs=0.025)  # the mean of a Dirichlet


def test_dirichlet_takes_the_best_in_the_first_epoch_alone():
    """Beside the published rule, written down once more: the best with probability eps·exp(-λt) while the first epoch lasts."""
    options = dirichlet.Options(eps=1.0, eps_decay=0.0, explore=3, prior=1.0)
    counts = [0] * 5
    for window in range(12):
        t = turn(window, keep=2, counts=tuple(counts))
        draw = random.Random(f"layerpeft dirichlet {t.seed}")
        greedy = draw.random() < 1.0 and window < 3
        want = [0, 2]
        if not greedy:
            chance, want = [draw.gammavariate(n + 1.0, 1.0) for n in counts], []
            for _ in range(2):
                point, left = draw.random() * sum(chance), [i for i in range(5) if chance[i]]
                want.append(next(i for i in left if point < sum(chance[j] for j in left if j <= i)))
                chance[want[-1]] = 0.0
        assert list(dirichlet.again(t, options).positions) == want
        for i in want:
            counts[i] += 1
    assert counts[0] >= 3 and len([n for n in counts if n]) > 2


def test_dirichlet_spreads_more_than_its_mean_would():
    """Fresh p in every window: two draws of one window are tied to each other as a Dirichlet ties them."""
    options = dirichlet.Options(eps=1e-9, prior=0.2)
    got = shares(dirichlet, options, keep=1, counts=(0, 0, 0, 0, 0))
    assert got == pytest.approx([0.2] * 5, abs=0.03)


def test_dirichlet_without_scores_does_not_fall_to_the_lowest_layers():
    picked = {dirichlet.again(turn(0, seed=s, scores=[0.0] * 5), dirichlet.Options()).positions for s in range(60)}
    assert len(picked) > 8
    with pytest.raises(SelectionError, match=r"eps: 2\.0 is above 1"):
        dirichlet.again(turn(0), dirichlet.Options(eps=2.0))


# ---- ir_tuning ------------------------------------------------------------------------------------------------------

A = (0.1, 0.2, 0.3, 0.35, 0.4, 1.0, 1.1, 1.2, 1.3, 1.5)
B = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 9.0)


@pytest.mark.parametrize(("scores", "coded", "meant"), [(A, 6, 5), (B, 7, 6)])
def test_ir_tuning_golden_values(scores, coded, meant):
    order = random.Random(1).sample(range(10), 10)
    mixed = [scores[i] for i in order]
    slipped = ir_tuning.again(turn(3, None, mixed), ir_tuning.Options()).positions
    assert {mixed[i] for i in slipped} == set(scores[-coded:])
    intended = ir_tuning.again(turn(3, None, mixed), ir_tuning.Options(slip=False)).positions
    assert {mixed[i] for i in intended} == set(scores[-meant:])
    assert len(split.pick(mixed, None, 0, split.Options(split="ir_tuning"))) == meant


@pytest.mark.parametrize(("n", "least", "most"), [(24, 9, 16), (28, 10, 19), (32, 12, 21), (36, 13, 24), (40, 14, 26)])
def test_how_many_ir_tuning_trains_is_decided_by_its_window(n, least, most):
    generator = random.Random(0)
    counts = [
        len(
            ir_tuning.again(
                turn(1, None, [generator.lognormvariate(0, 1) for _ in range(n)]), ir_tuning.Options()
            ).positions
        )
        for _ in range(400)
    ]
    assert min(counts) >= least and max(counts) <= most
    assert (counts.count(least) + counts.count(most)) / 400 > 0.7
    outlier = [generator.random() for _ in range(n - 1)] + [50.0]
    assert len(ir_tuning.again(turn(1, None, outlier), ir_tuning.Options()).positions) == most


def test_equal_scores_are_a_seeded_random_set_and_the_unseen_come_next():
    start = [1000.0] * 32
    sets = {ir_tuning.again(turn(0, None, start, seed=s), ir_tuning.Options()).positions for s in range(10)}
    assert len(sets) == 10
    first = ir_tuning.again(turn(0, None, start), ir_tuning.Options()).positions
    assert first == ir_tuning.again(turn(0, None, start), ir_tuning.Options()).positions
    seen = [1.0 + 0.01 * i if i in first else 1000.0 for i in range(32)]
    second = ir_tuning.again(turn(1, None, seen), ir_tuning.Options()).positions
    assert set(range(32)) - set(first) <= set(second)
    with pytest.raises(SelectionError, match="keep: auto instead of keep: 2"):
        ir_tuning.again(turn(0), ir_tuning.Options())


def simulated(probed: bool, seed: int, steps: int = 300) -> tuple[list[int], float]:
    """32 layers whose gradients shrink while they train; after 200 steps the eight smallest grow tenfold.

    Returns in how many of the first 200 steps each layer was active, and how much of the time afterwards those eight were.
    """
    generator = random.Random(seed)
    true = [generator.lognormvariate(0, 0.5) for _ in range(32)]
    risen = sorted(range(32), key=lambda i: true[i])[:8]
    known, counts, found = [1000.0] * 32, [0] * 32, 0
    for step in range(steps):
        if step == 200:
            true = [10 * t if i in risen else t for i, t in enumerate(true)]
        if probed and step:
            known = [t * generator.lognormvariate(0, 0.1) * 0.995**step for t in true]
            active = split.pick(known, None, 0, split.Options(split="ir_tuning"))
        else:
            active = ir_tuning.again(turn(step, None, known, seed), ir_tuning.Options()).positions
        for i in active:
            counts[i] += step < 200
            found += step >= 200 and i in risen
            known[i] = true[i] * generator.lognormvariate(0, 0.1) * 0.995**step
    return counts, found / (8 * (steps - 200))


def test_published_scores_go_stale_and_the_choice_freezes_where_probed_ones_follow():
    runs = {probed: [simulated(probed, seed) for seed in range(10)] for probed in (False, True)}
    settled = [sum(c > 180 for c in counts) + sum(c < 20 for c in counts) for counts, _ in runs[False]]
    found = {probed: sum(f for _, f in pair) / 10 for probed, pair in runs.items()}
    assert sum(settled) / 10 > 0.6 * 32  # most layers are on nearly always or nearly never
    assert found[True] > 0.99  # a probe sees at once that frozen layers' gradients have grown
    assert found[False] < 0.65


def test_the_published_rule_with_a_probe_would_not_freeze():
    """The fault lies in the scores: with fresh ones, its choice changes with the true order."""
    t = turn(3, None, list(A) * 2)
    before = set(ir_tuning.again(t, ir_tuning.Options()).positions)
    after = set(ir_tuning.again(replace(t, scores=tuple(1 / s for s in t.scores)), ir_tuning.Options()).positions)
    assert len(before & after) <= 4
