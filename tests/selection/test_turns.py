"""Seeds of windows, the memory of scores, and draws by weight."""

from __future__ import annotations

import math
import random

import pytest

from layerpeft.selection.draws import sigmoid, successive, window_seed
from layerpeft.selection.schedule import remembered


def test_window_zero_has_the_seed_itself_and_the_others_one_each():
    assert window_seed(7, 0) == 7
    seeds = [window_seed(s, w) for s in range(20) for w in range(1, 50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**48 for s in seeds)
    # written down: a resumed run must draw what the first one would have drawn, under any later version
    assert (window_seed(0, 1), window_seed(3, 12)) == (216343755745005, 115663392799337)


def test_memory_keeps_what_was_not_seen_and_blends_what_was():
    before, seen = (1.0, None, 4.0, None), (3.0, 5.0, None, None)
    assert remembered(before, seen, "last", 0.9) == (3.0, 5.0, 4.0, None)
    assert remembered(before, seen, "ema", 0.75) == (1.5, 5.0, 4.0, None)
    with pytest.raises(ValueError):
        remembered((1.0,), (1.0, 2.0), "last", 0.9)


def test_an_ema_follows_its_closed_form():
    known: tuple[float | None, ...] = (None,)
    for value in (2.0, 6.0, 6.0, 6.0):
        known = remembered(known, (value,), "ema", 0.5)
    assert known == (pytest.approx(6 - 4 * 0.5**3),)


def test_successive_draws_by_weight():
    pairs = [tuple(successive([1.0, 2.0, 5.0], 2, random.Random(s))) for s in range(6000)]
    for (a, wa), (b, wb) in [((0, 1), (2, 5)), ((2, 5), (1, 2)), ((1, 2), (0, 1))]:
        assert pairs.count((a, b)) / 6000 == pytest.approx(wa / 8 * wb / (8 - wa), abs=0.02)


def test_what_weighs_nothing_comes_last():
    drawn = [successive([0.0, 1.0, 0.0, 2.0], 3, random.Random(s)) for s in range(2000)]
    assert all({1, 3} == set(d[:2]) for d in drawn)
    assert [d[2] for d in drawn].count(0) / 2000 == pytest.approx(0.5, abs=0.04)
    assert sorted(successive([0.0] * 4, 4, random.Random(0))) == [0, 1, 2, 3]


def test_sigmoid_overflows_nowhere():
    assert sigmoid(0.0) == 0.5 and sigmoid(2.0) == pytest.approx(1 / (1 + math.exp(-2)))
    assert sigmoid(1e4) == 1.0 and sigmoid(-1e4) == 0.0
    assert sigmoid(-3.0) + sigmoid(3.0) == pytest.approx(1.0)
