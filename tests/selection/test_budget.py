"""Choices that weigh what layers cost: `per: cost` and `keep: {time: 50%}`, against brute force and against counted steps."""

from __future__ import annotations

import json
import random
from itertools import combinations

import pytest

from layerpeft import LayerFullConfig, LayerLoraConfig, Select, get_peft_model, plan
from layerpeft.cli import main
from layerpeft.errors import LayerpeftError, SelectionError
from layerpeft.model.costs import Costs, LayerCost
from layerpeft.planning.trace import trace
from layerpeft.selection.budget import best_within
from tests.helpers.loops import llama, make_batches
from tests.helpers.models import MODELS
from tests.helpers.short import short_llama

HALF = {"time": "50%"}


def drawn(seed: int, count: int = 8) -> tuple[Costs, list[float]]:
    """Layers of two kinds, and scores of which some are equal."""
    draw = random.Random(seed)
    kinds = [LayerCost(40, 30, 0, 12, 9), LayerCost(70, 55, draw.choice((0, 60)), 31, 14)]
    layers = tuple(draw.choice(kinds) for _ in range(count))
    return Costs(draw.randint(0, 100), draw.randint(0, 50), layers), [float(draw.randint(0, 6)) for _ in layers]


@pytest.mark.parametrize("seed", range(12))
def test_the_set_is_the_best_of_all(seed):
    costs, values = drawn(seed)
    among = sorted(random.Random(seed).sample(range(8), 7))
    values = [values[i] - 2 * (seed % 3 == 0) for i in among]  # some of them negative
    sets = [held for n in range(1, 8) for held in combinations(range(7), n)]
    room = random.Random(seed).uniform(0.5, 1) * costs.of(range(8))

    def worth(held):
        return sum(values[i] - min(0, *values) for i in held), -costs.of([among[i] for i in held])

    fitting = [held for held in sets if costs.of([among[i] for i in held]) <= room]
    found = best_within(values, among, costs, room)
    assert worth([among.index(i) for i in found]) == max(map(worth, fitting)) and list(found) == sorted(found)


def test_with_equal_scores_it_is_a_contiguous_top():
    costs = Costs(20, 10, (LayerCost(10, 10, 0, 5, 2),) * 9)
    assert best_within([1.0] * 9, range(9), costs, costs.of(range(5, 9))) == (5, 6, 7, 8)
    with pytest.raises(SelectionError, match="holds no layer; the cheapest, 8, takes 153.*: write time: .*% or more"):
        best_within([1.0] * 9, range(9), costs, 100)


@pytest.mark.parametrize(("kind", "share"), [(LayerLoraConfig, 0.6), (LayerFullConfig, 0.7)])
def test_what_a_step_then_takes_stays_within_the_budget(kind, share):
    """Of steps of real models, counted as they run: they know nothing of the closed forms."""
    keep, options = {"time": share, "length": 12}, {} if kind is LayerFullConfig else {"r": 4}

    def wrapped(select, **more):
        return get_peft_model(llama(num_hidden_layers=6), kind(select=select, **options, **more))

    found = wrapped({"by": "gradient_norm", "keep": keep, "num_batches": 2}, batches=make_batches())
    selection = found.peft_config["default"]._layerpeft.selection
    assert selection.select["keep"] == keep
    assert "of the operations of training all layers, rows of 12 tokens" in selection.why
    room, chosen = share * trace(wrapped("0-5"), 2, 12).flops, list(selection.layers)
    assert trace(found, 2, 12).flops <= 1.02 * room
    more = [sorted({*chosen, i}) for i in set(range(6)) - set(chosen)]
    assert all(trace(wrapped(layers), 2, 12).flops > 0.98 * room for layers in more)  # none is left out for nothing


def test_a_layer_is_weighed_against_the_way_down_to_it():
    scores = [6.5, 1.0, 1.0, 4.0, 1.0, 3.5]
    batches = make_batches()
    model = llama(num_hidden_layers=6)
    plain = get_peft_model(model, LayerLoraConfig(select={"by": "gradient_norm", "keep": 1}, r=4, batches=batches))
    record = plain.peft_config["default"]._layerpeft.selection
    given = {**record.scores.to_dict(), "values": scores}

    def chosen(**more):
        config = LayerLoraConfig(select={"by": given, "keep": 2, **more}, r=4)
        selection = get_peft_model(llama(num_hidden_layers=6), config).peft_config["default"]._layerpeft.selection
        return selection.layers, selection.why

    assert chosen()[0] == (0, 3)
    layers, why = chosen(per="cost")
    assert layers == (3, 5) and "by gradient_norm over cost" in why


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"keep": {"tme": "50%"}}, "Did you mean 'time'?"),
        ({"keep": {"time": "150%"}}, "time: '150%' is not a share between 0 and 1"),
        ({"keep": {"time": 1}}, "time: 1 is not a share between 0 and 1"),
        ({"keep": {}}, "time: None is not a share"),
        ({"keep": {"time": 0.5, "length": 0}}, "length: 0 is not a whole number from 1"),
        ({"keep": HALF, "pick": "bottom"}, "by pick: top, not 'bottom'"),
        ({"keep": HALF, "per": "cost"}, "counts what layers cost already"),
        ({"keep": HALF, "reselect_steps": 5}, "keep: costs are weighed in a choice that is made once"),
        ({"keep": 2, "per": "cost", "reselect_steps": 5}, "per: costs are weighed in a choice that is made once"),
        ({"keep": 2, "per": "csot"}, "Did you mean 'cost'?"),
        ({"keep": 2, "per": "cost", "pick": "uniform"}, "pick: uniform looks at none"),
        ({"per": "cost"}, "say how many with keep"),
    ],
)
def test_what_cannot_be_weighed_is_refused(select, message):
    with pytest.raises(SelectionError) as caught:
        Select.parse({"by": "snr", **select})
    assert message in str(caught.value)


def test_a_misspelt_budget_is_one_problem():
    with pytest.raises(SelectionError) as caught:
        Select.parse({"by": "snr", "keep": {"tme": "50%"}})
    assert len(caught.value.listed()) == 1


def test_a_model_without_closed_forms_says_so_before_anything_is_scored():
    config = LayerFullConfig(select={"by": "gradient_norm", "keep": HALF})
    with pytest.raises(
        LayerpeftError, match=r"keep: the operations of a layer are not known: .*mixer.* write keep as a number"
    ):
        plan(MODELS["mamba"](), config)


def test_a_recipe_counts_by_its_own_rows(capsys, tmp_path):
    words = [
        f"model_name_or_path={short_llama(3)}",
        f"output_dir={tmp_path / 'out'}",
        "max_length=48",
        "max_train_samples=8",
    ]
    select = "layerpeft.select={by: gradient_norm, keep: {time: 80%}, num_batches: 1}"
    assert main(["plan", "quickstart", select, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "as many as the budget holds are assumed" in " ".join(found["assumed"])
    assert 0 < sum(row["trains"] for row in found["rows"]) < 3
    assert main(["score", "quickstart", select, *words]) == 0
    assert "of the operations of training all layers, rows of 48 tokens" in capsys.readouterr().out
