"""The layer grammar, the rules, and everything that cannot be chosen."""

from __future__ import annotations

import pytest

from layerpeft import Scores, Select, Selection, layer_map
from layerpeft.errors import ScoreError, SelectionError
from layerpeft.model.targets import find_targets
from layerpeft.selection import plugins
from layerpeft.selection.choose import choose_among
from layerpeft.selection.grammar import how_many, layer_numbers
from layerpeft.selection.picks import sample, split


def choose(model, select, **names) -> Selection:
    select = Select.parse(select)
    layers = layer_map(model, select.stack)
    return choose_among(model, select, layers, find_targets(model, layers, **names))


@pytest.mark.parametrize(
    ("grammar", "want"),
    [
        (3, (3,)),
        (-1, (11,)),
        ("-2", (10,)),
        ("5", (5,)),
        ([3, 7], (3, 7)),
        ("8-11", (8, 9, 10, 11)),
        ("first:2", (0, 1)),
        ("last:25%", (9, 10, 11)),
        ("first:10+last:2", tuple(range(12))),
        ("first:1+last:2", (0, 10, 11)),
        ("stride:4", (0, 4, 8)),
        ("all", tuple(range(12))),
        ([0, "10-11"], (0, 10, 11)),
        ("3,7", (3, 7)),
        ("first:1%", (0,)),
        ("last:12.5%", (10, 11)),
    ],
)
def test_grammar(grammar, want):
    assert layer_numbers(grammar, 12) == want


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (12, "12 is out of range; layers are 0 to 11"),
        (-13, "out of range"),
        ("8-15", "'8-15' is out of range"),
        ("9-8", "runs backwards; write 8-9"),
        ("first:13", "asks for 13 layers of 12"),
        ("first:0", "whole number from 1"),
        ("last:0%", "share above 0 %"),
        ("last:101%", "share above 0 %"),
        ("stride:0", "cannot read"),
        ("lsat:3", "cannot read 'lsat:3'"),
        ("first:1.5", "whole number from 1"),
        ([], "names no layer"),
        ([3, 99, "x"], "2 problems"),
    ],
)
def test_grammar_refuses(grammar, message):
    with pytest.raises(SelectionError, match=message):
        layer_numbers(grammar, 12)


@pytest.mark.parametrize(
    ("keep", "count", "want"),
    [(3, 12, 3), (0.25, 12, 3), ("25%", 10, 3), (0.25, 26, 7), (0.01, 12, 1), ("50%", 5, 3), ("auto", 12, None)],
)
def test_keep(keep, count, want):
    assert how_many(keep, count) == want


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"by": "gradient_nrom", "keep": 1}, "Did you mean 'gradient_norm'"),
        ({"by": "gradient_norm"}, "keep: missing"),
        ({"by": "gradient_norm", "keep": 1.0}, "write 1 for one layer, or select: all"),
        ({"by": "gradient_norm", "keep": 0}, "a whole number from 1"),
        ({"by": "gradient_norm", "keep": 1.5}, "a share between 0 and 1"),
        ({"by": "gradient_norm", "keep": True}, "a whole number from 1"),
        ({"by": "gradient_norm", "keep": "100%"}, "select: all"),
        ({"by": "gradient_norm", "keep": 2, "pick": "tpo"}, "Did you mean 'top'"),
        ({"by": "gradient_norm", "keep": "auto", "pick": "top"}, "pick is 'split'"),
        ({"by": "gradient_norm", "keep": 3, "pick": "split"}, "keep: auto"),
        ({"by": "gradient_norm", "keep": 3, "exat": True}, "Did you mean 'exact'"),
        ({"by": "gradient_norm", "keep": 3, "exact": "yes"}, "not true or false"),
        ({"by": "gradient_norm", "keep": 3, "normalize": "weigth"}, "Did you mean 'weight'"),
        ({"by": "gradient_norm", "keep": 3, "k": 0}, "whole number from 1"),
        ({"by": "outliers", "keep": 3, "M": -1}, "number above 0"),
        ({"by": "outliers", "keep": 3, "num_batches": 0}, "num_batches: 0"),
        ({"by": "random", "keep": 3, "seed": "a"}, "seed: 'a'"),
        ({"by": "random", "keep": 3, "layers": "lats:2"}, "layers: cannot read"),
        ({"by": "random", "keep": 3, "exclude": {}}, "exclude: cannot read"),
        ({"by": "absent.json", "keep": 3}, "no scores file"),
        ("lats:3", "cannot read"),
        (3.5, "cannot read"),
    ],
)
def test_select_refuses(value, message):
    with pytest.raises(SelectionError, match=message):
        Select.parse(value)


def test_every_problem_is_in_one_message():
    with pytest.raises(SelectionError, match="4 problems") as caught:
        Select.parse({"by": "outlier", "keep": -1, "pick": "best", "sed": 3})
    for part in ("'outlier'", "keep: -1", "'best'", "'sed'"):
        assert part in str(caught.value)


def test_the_three_spellings_mean_the_same():
    full = Select.parse({"by": "gradient_norm", "keep": 3, "exact": True})
    assert Select.parse(full) == full == Select.parse(full.to_dict())
    assert Select.parse("all").is_all and Select.parse({"layers": "all"}).is_all
    assert not Select.parse("last:1").is_all and not Select.parse({"exclude": 0}).is_all


@pytest.mark.parametrize(
    ("scores", "otsu", "meant"),
    [
        ([0.1, 0.2, 0.3, 0.35, 0.4, 1.0, 1.1, 1.2, 1.3, 1.5], 5, 5),
        ([0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 9.0], 1, 6),
    ],
)
def test_split_golden_values(scores, otsu, meant):
    shuffled = scores[::-1]
    assert len(split.pick(shuffled, None, 0, split.Options())) == otsu
    assert len(split.pick(shuffled, None, 0, split.Options(split="ir_tuning"))) == meant


def test_windowed_variance_golden_values():
    scores = [0.1, 0.2, 0.3, 0.35, 0.4, 1.0, 1.1, 1.2, 1.3, 1.5]
    want = [0.2222, 0.1990, 0.1737, 0.1273, 0.0412, 0.1056, 0.1487, 0.1812, 0.2032]
    assert split.variance_sums(scores) == pytest.approx(want, abs=5e-5)
    assert split.windowed_cut(scores, (0.35, 0.65)) == 5  # list index 4, the cut after five layers


@pytest.mark.parametrize(("n", "fewest", "most"), [(24, 8, 15), (32, 11, 20), (40, 13, 25)])
def test_the_window_bounds_the_number(n, fewest, most):
    low = split.pick([1.0] * (n - 1) + [50.0], None, 0, split.Options(split="ir_tuning"))
    high = split.pick([0.0] + [50.0 + i for i in range(n - 1)], None, 0, split.Options(split="ir_tuning"))
    assert fewest <= len(low) <= most and fewest <= len(high) <= most


def test_split_needs_two_different_scores():
    with pytest.raises(SelectionError, match="two different scores"):
        split.pick([1.0, 1.0], None, 0, split.Options())


def test_sampling_is_in_proportion_to_score_and_without_replacement():
    scores = [0.0, 1.0, 2.0, 5.0]
    first = [sample.pick(scores, 1, s, sample.Options())[0] for s in range(4000)]
    shares = [first.count(i) / 4000 for i in range(4)]
    assert shares[0] == 0 and shares[1:] == pytest.approx([0.125, 0.25, 0.625], abs=0.03)
    assert all(sorted(sample.pick(scores, 3, s, sample.Options())) == [1, 2, 3] for s in range(50))
    # successive draws: P(2 then 3 or 3 then 2 | two of three) by hand
    pairs = [frozenset(sample.pick(scores, 2, s, sample.Options())) for s in range(4000)]
    want = 2 / 8 * 5 / 6 + 5 / 8 * 2 / 3
    assert pairs.count(frozenset({2, 3})) / 4000 == pytest.approx(want, abs=0.03)
    with pytest.raises(SelectionError, match="only 3 have a score above zero"):
        sample.pick(scores, 4, 0, sample.Options())
    with pytest.raises(SelectionError, match="negative"):
        sample.pick([-1.0, 1.0], 1, 0, sample.Options())


ONCE = [n for n in plugins.names("layerpeft.picks") if hasattr(plugins.get("layerpeft.picks", n), "pick")]


@pytest.mark.parametrize("name", ONCE)
def test_every_rule_gives_distinct_positions_and_breaks_ties_by_index(name):
    rule = plugins.get("layerpeft.picks", name)
    scores = [3.0, 1.0, 3.0, 1.0, 2.0]
    picked = rule.pick(scores, None if name == "split" else 3, 7, rule.Options())
    assert len(set(picked)) == len(picked) and set(picked) <= set(range(5))
    assert rule.pick(scores, None if name == "split" else 3, 7, rule.Options()) == picked
    if name == "top":
        assert picked == [0, 2, 4]
    if name == "bottom":
        assert picked == [1, 3, 4]


def test_choose_by_scores_handed_back(llama, tmp_path):
    layers = layer_map(llama)
    scores = Scores(tuple(float(i % 5) for i in range(12)), "mine", layers.fingerprint, layers.stack)
    scores.save(tmp_path / "s.json")
    for by in (scores, str(tmp_path / "s.json")):
        got = choose(llama, {"by": by, "keep": 3})
        assert got.layers == (3, 4, 9)
    assert choose(llama, {"by": scores, "keep": 2, "pick": "bottom"}).layers == (0, 5)
    assert choose(llama, {"by": scores, "keep": 2, "exclude": "4+9"}).layers == (3, 8)
    assert choose(llama, {"by": scores, "keep": 1, "layers": "0-2"}).layers == (2,)
    with pytest.raises(SelectionError, match="5 layers are asked for, and there are 3"):
        choose(llama, {"by": scores, "keep": 5, "layers": "first:3"})
    with pytest.raises(SelectionError, match="no layer is left"):
        choose(llama, {"by": scores, "keep": 1, "layers": "first:3", "exclude": "first:4"})
    wrong = Scores((1.0, 2.0), "mine", layers.fingerprint, layers.stack)
    with pytest.raises(ScoreError, match="hold 2 layers"):
        choose(llama, {"by": wrong, "keep": 1})


def test_a_selection_survives_json(llama):
    import json

    got = choose(llama, {"by": "random", "keep": 0.25, "seed": 3}, target_modules=["q_proj", "down_proj"])
    assert Selection.from_dict(json.loads(json.dumps(got.to_dict()))) == got
    assert len(got.layers) == 3 and len(got.targets) == 6
    assert all(t.startswith(tuple(f"model.layers.{i}." for i in got.layers)) for t in got.targets)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "'q_prj' matches no target in the layers. Did you mean 'q_proj'"),
        (["q_proj", "lm_head"], "'lm_head' matches no target in the layers"),
        (r".*nothing.*", "the regex '.*nothing.*' matches no target"),
        (["proj"], "'proj' matches no target"),
    ],
)
def test_target_names_are_never_matched_in_part(llama, targets, message):
    with pytest.raises(SelectionError, match=message):
        choose(llama, "last:2", target_modules=targets)


def test_excluded_modules_must_exist(llama):
    got = choose(llama, "last:1", target_modules="all-linear", exclude_modules=["down_proj"])
    assert len(got.targets) == 6 and not any("down_proj" in t for t in got.targets)
    with pytest.raises(SelectionError, match="exclude_modules: 'dwn_proj'"):
        choose(llama, "last:1", target_modules="all-linear", exclude_modules=["dwn_proj"])
