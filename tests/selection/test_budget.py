"""Choices that weigh what layers cost: `per: cost`, `keep: {time: 50%}`, `{memory: 8GB}`, beside brute force and counted steps."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from layerpeft import (
    LayerFullConfig,
    LayerGaloreConfig,
    LayerHeadConfig,
    LayerLoraConfig,
    Select,
    get_peft_model,
    layer_map,
    score_layers,
)
from layerpeft.cli import main
from layerpeft.errors import LayerpeftError, Problems, SelectionError
from layerpeft.integrations.tracing import weight_bytes
from layerpeft.model.costs import Costs, LayerCost, costs_of
from layerpeft.model.load import Work
from layerpeft.model.memory import Below, LayerBytes, Memory, Span
from layerpeft.planning import layers as planned
from layerpeft.planning.layers import traced
from layerpeft.planning.plan import peak_bytes
from layerpeft.planning.trace import Step, gradient_bytes, trace
from layerpeft.recipe.measure import state_bytes
from layerpeft.recipe.read import load_recipe
from layerpeft.selection.budget import Budget, Shape, best_within
from tests.helpers.loops import llama, make_batches
from tests.helpers.models import MODELS, Moody, batch
from tests.helpers.passes import beginning_at
from tests.helpers.repeating import repeated, some
from tests.helpers.short import short_llama

HALF = {"time": "50%"}


def drawn(seed: int, count: int = 8) -> tuple[Costs, list[float]]:
    """Layers of two kinds, and scores of which some are equal; of some, states are kept for two of three epochs, or for all."""
    draw = random.Random(seed)
    kinds = [LayerCost(40, 30, 0, 12, 9), LayerCost(70, 55, draw.choice((0, 60)), 31, 14)]
    layers = tuple(draw.choice(kinds) for _ in range(count))
    costs = Costs(draw.randint(0, 100), draw.randint(0, 50), layers, whole=(1.0, 1 / 3, 0.0)[seed % 3])
    return costs, [float(draw.randint(0, 6)) for _ in layers]


@pytest.mark.parametrize("seed", range(12))
def test_the_set_is_the_best_of_all(seed):
    costs, values = drawn(seed)
    among = sorted(random.Random(seed).sample(range(8), 7))
    values = [values[i] - 2 * (seed % 4 == 0) for i in among]  # some of them negative
    sets = [held for n in range(1, 8) for held in combinations(range(7), n)]
    room = random.Random(seed).uniform(0.5, 1) * costs.of(range(8))

    def worth(held):
        return sum(values[i] - min(0, *values) for i in held), -costs.of([among[i] for i in held])

    fitting = [held for held in sets if costs.of([among[i] for i in held]) <= room]
    found = best_within(values, among, costs, room)
    assert worth([among.index(i) for i in found]) == max(map(worth, fitting)) and list(found) == sorted(found)


def walked(memory: Memory, chosen: tuple[int, ...]) -> int:
    """The most that is there at any moment of a step, counted as it goes by."""
    lowest, layers, top = min(chosen), memory.layers, len(memory.layers)
    spans = [b.lowest if i == lowest else b.trained if i in chosen else b.frozen for i, b in enumerate(layers)]
    now, seen = memory.below[lowest].start, [memory.below[lowest].most]
    for span in spans[lowest:]:
        seen.append(now + span.peak)
        now += span.kept
    seen.append(now + memory.head[0])
    now += memory.head[1]
    for i in range(top - 1, lowest - 1, -1):
        seen.append(now + spans[i].back)
        now += spans[i].left
    return memory.lasting + sum(layers[i].lasting for i in chosen) + max(seen) + memory.below[lowest].besides


@pytest.mark.parametrize("seed", range(12))
def test_the_set_is_the_best_of_all_that_fit_into_memory(seed):
    draw = random.Random(seed)

    def span(more: int) -> Span:
        kept = draw.randint(5, 40) + more
        return Span(kept, kept + draw.randint(0, 60), draw.randint(0, 60), draw.randint(0, 9 * more) - kept)

    packed = 25 * (seed % 2)  # layers may take less once they train
    kinds = [LayerBytes(span(0), span(6), span(4), draw.randint(-packed, 30)) for _ in range(2)]
    below = tuple(Below(10 + i, draw.randint(10, 200), draw.randint(-3, 3)) for i in range(7))
    head = draw.choice((0, 150)), draw.randint(-20, 20)
    memory = Memory(100, below, head, tuple(draw.choice(kinds) for _ in range(7)))
    values = [float(draw.randint(0, 6)) for _ in range(7)]
    sets = [held for n in range(1, 8) for held in combinations(range(7), n)]
    assert all(memory.of(held) == walked(memory, held) for held in sets)
    room = memory.of([6]) + draw.random() * (memory.of(range(7)) - memory.of([6]))
    found = best_within(values, range(7), memory, room)

    def worth(held):
        return sum(values[i] for i in held), -memory.of(held)

    assert worth(found) == max(worth(held) for held in sets if memory.of(held) <= room)


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


@pytest.mark.parametrize(
    ("kind", "again", "count"),
    [(LayerLoraConfig, False, 3), repeated((LayerFullConfig, False, 4)), repeated((LayerFullConfig, True, 4))],
)
def test_a_step_takes_no_more_memory_than_the_budget(kind, again, count):
    """The set is the best of all by plans of each, and what a real step is counted to take stays within the budget."""
    model, options = llama(num_hidden_layers=count, num_key_value_heads=4), {"r": 4} if kind is LayerLoraConfig else {}
    given = {"batch_size": 2, "length": 12, "optimizer": "adamw_torch", "checkpointing": again, "step": Step()}
    sets = [list(held) for n in range(1, count + 1) for held in combinations(range(count), n)]
    taken = [peak_bytes(model, kind(select=held, **options), **given) for held in sets]

    def chosen(room):
        keep = {"memory": room, "rows": 2, "length": 12, "checkpointing": again}
        found = get_peft_model(
            llama(num_hidden_layers=count, num_key_value_heads=4),
            kind(select={"by": "random", "keep": keep, "seed": 3}, **options),
        )
        return found, found.peft_config["default"]._layerpeft.selection

    for room in ("85%", 1.01 * sorted(taken)[len(taken) // 2]):
        found, selection = chosen(room if isinstance(room, str) else int(room))
        limit = 0.85 * taken[-1] if isinstance(room, str) else int(room)
        fitting = [
            (sum(selection.scores.values[i] for i in held), -size, held) for held, size in zip(sets, taken, strict=True)
        ]
        assert list(selection.layers) == max(f for f in fitting if -f[1] <= limit)[2]
    assert (
        "2 rows of 12 tokens, adamw_torch" in selection.why and "of the bytes of training all layers" in selection.why
    )
    closest = max(size for size in taken if size <= limit)
    found, selection = chosen(f"{closest + 9}B")  # a budget that a set is close to
    optimizer = torch.optim.AdamW([p for p in found.parameters() if p.requires_grad])
    if again:
        found.get_base_model().activation_checkpointing_enable()
    activations = trace(found, 2, 12).peak
    found(**make_batches()[0]).loss.backward()
    gradients = gradient_bytes(found)
    optimizer.step()
    states = state_bytes(optimizer) - sum(4 for p in optimizer.state)  # a counter of steps each
    real = weight_bytes(found) + gradients + states + activations
    assert real <= closest + 9
    if taken[sets.index(list(selection.layers))] == closest:
        assert real >= 0.95 * closest


TRACED = ["nanogpt", "t5", "jamba", "mamba", "qwen3_next", "zamba2", "bart", "deberta_v2", "whisper", "gemma3_vlm"]


@pytest.mark.parametrize("name", some(TRACED, 1))
def test_operations_are_those_of_a_trace_where_they_do_not_follow_from_shapes(name):
    keep, options = {"time": "75%", "length": 8}, {"r": 4, "target_modules": "all-linear"}
    if name == "qwen3_next":  # which PEFT cannot wrap by themselves there
        options["exclude_modules"] = [f"shared_expert.{n}_proj" for n in ("down", "gate", "up")]
    model = MODELS[name]()
    drawn = torch.get_rng_state()
    costs = traced(LayerLoraConfig(**options), model, layer_map(model), Budget.parse(keep, Problems("")))
    assert torch.equal(drawn, torch.get_rng_state()) and not any(p.is_meta for p in model.parameters())
    for held in ([0, 2],) if name in TRACED[:2] else ([0], [2], [1, 2], [0, 1, 2]):
        real = get_peft_model(MODELS[name](), LayerLoraConfig(select=held, **options)).train()
        assert costs.of(held) == pytest.approx(trace(real, 1, 8).flops, rel=0.02), held
        with beginning_at(min(held), real, layer_map(model), batch(name, real, 1)):
            later = trace(real, 1, 8).flops
        assert replace(costs, whole=0.0).of(held) == pytest.approx(later, rel=0.02), held
    found = get_peft_model(model, LayerLoraConfig(select={"keep": keep, "by": "random"}, **options)).train()
    assert trace(found, 1, 8).flops <= 1.02 * 0.75 * costs.of(range(len(costs.layers)))
    assert "rows of 8 tokens" in found.peft_config["default"]._layerpeft.selection.why


@pytest.mark.parametrize(
    "name", some(["gemma2", "mixtral", "gpt2", "jamba", "t5", "gemma3_vlm", "vit", "bert", "gpt_oss"], 0)
)
def test_bytes_of_sets_are_those_of_their_plans(name):
    for kind, options in ((LayerLoraConfig, {"r": 4, "target_modules": "all-linear"}), (LayerFullConfig, {})):
        for again in (False, True):
            model = MODELS[name]()
            found = traced(
                kind(**options), model, layer_map(model), Budget("memory", 0.5, Shape(2, 16, checkpointing=again))
            )
            given = {"batch_size": 2, "length": 16, "optimizer": "adamw_torch", "checkpointing": again, "step": Step()}
            for held in ([2], [0], [0, 1], [1, 2]):
                size = peak_bytes(MODELS[name](), kind(select=held, **options), **given)
                assert size <= found.of(held) + 1 <= 1.02 * size + 1, (kind, again, held)


BOTH = {"quantize_frozen": "nf4", "quantize_trained": "nf4"}


@pytest.mark.parametrize(
    ("kind", "options", "passes"),
    [
        (LayerLoraConfig, {"r": 4, "quantize_frozen": "nf4"}, 2),
        repeated((LayerLoraConfig, {"r": 4, "quantize_frozen": "int8"}, 5)),  # which keeps what it reads
        repeated((LayerLoraConfig, {"r": 4, "quantize_trained": "nf4"}, 2)),
        repeated((LayerLoraConfig, {"r": 4} | BOTH, 2)),
        repeated((LayerFullConfig, {"quantize_frozen": "nf4"}, 2)),
        repeated((LayerGaloreConfig, {"r": 4}, 2)),
        repeated((LayerHeadConfig, {}, 5)),
    ],
)
def test_bytes_come_in_closed_form_where_two_passes_agree(kind, options, passes, monkeypatch):
    """Of packed layers, projections and offsets too; otherwise from traces. No set takes more than is said."""
    if any(name.startswith("quantize") for name in options):
        pytest.importorskip("bitsandbytes")
    seen, real = [], planned.parted
    monkeypatch.setattr(planned, "parted", lambda *given: seen.append(1) or real(*given))

    def built():
        return llama(num_hidden_layers=4, hidden_size=64, intermediate_size=128)

    model = built()
    found = traced(kind(**options), model, layer_map(model), Budget("memory", 0.5, Shape(2, 12)))
    assert len(seen) == passes
    given = {"batch_size": 2, "length": 12, "optimizer": "adamw_torch", "checkpointing": False, "step": Step()}
    for held in ([1], [0, 2, 3]):
        size = peak_bytes(built(), kind(select=held, **options), **given)
        assert size <= found.of(held) + 1 <= 1.02 * size + 1, held
        if passes == 2:  # what the model lets go of above the layers, and what each of them does, is not taken twice
            assert found.of(held) == pytest.approx(size, rel=1e-3), held


@pytest.mark.parametrize("kind", [LayerGaloreConfig, LayerHeadConfig, LayerLoraConfig])
def test_units_below_a_layer_have_no_budget_of_bytes(kind):
    unit = "head" if kind is LayerHeadConfig else "sublayer"
    with pytest.raises(LayerpeftError, match=f"costs and overlaps are those of layers, not of unit: {unit}"):
        kind(select={"by": "random", "keep": {"memory": "1GB"}, "unit": unit})


@pytest.mark.parametrize(("budget", "what"), [({"time": "50%"}, "operations"), ({"memory": "1GB"}, "bytes")])
def test_what_cannot_be_traced_says_so_before_anything_is_scored(budget, what):
    config = LayerLoraConfig(select={"by": "gradient_norm", "keep": budget}, target_modules="all-linear")
    with pytest.raises(
        LayerpeftError,
        match=f"keep: the {what} of a layer are not known: Moody cannot be traced .* write keep as a number",
    ):
        get_peft_model(Moody(), config)


def test_a_budget_that_nothing_fits_says_what_the_least_takes():
    config = LayerLoraConfig(select={"by": "random", "keep": {"memory": "1KB", "rows": 2, "length": 12}}, r=4)
    with pytest.raises(
        SelectionError,
        match=r"the budget of 1000 B holds no layer; the cheapest, 2, takes .* KiB: write memory: \d+ or",
    ):
        get_peft_model(llama(num_hidden_layers=3, num_key_value_heads=4), config)


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


WORTH = (6.5, 4.0, 1.0, 3.5)


def four(dropout: float = 0.0):
    return llama(num_hidden_layers=4, attention_dropout=dropout)


def chosen_by(select, kept: str | None = "memory", dropout: float = 0.0, worth=WORTH):
    """The choice among four layers by these scores."""
    given = {**score_layers(four(), by="random").to_dict(), "values": list(worth)}
    config = LayerLoraConfig(select={"by": given, **select}, r=4, prefix_cache=kept)
    return get_peft_model(four(dropout), config).peft_config["default"]._layerpeft.selection


def test_later_epochs_cost_what_they_then_cost():
    """The set is the best of all within the budget by steps that are counted as they run, whole or begun at a layer."""
    model, given, sets = four(), make_batches()[0], [h for n in (1, 2, 4) for h in combinations(range(4), n)]
    steps = {}
    for held in sets:
        real = get_peft_model(four(), LayerLoraConfig(select=list(held), r=4)).train()
        steps[held] = trace(real, 2, 12).flops
        with beginning_at(min(held), real, layer_map(model), given):
            steps[held] = steps[held], trace(real, 2, 12).flops
    for epochs, share, text in (
        (None, 0.35, "later epochs, which"),
        (3, 0.45, "a mean of 3 epochs, all but the first of which"),
    ):
        keep = {"keep": {"time": share, "length": 12}} | ({"epochs": epochs} if epochs else {})
        taken = {held: later if epochs is None else (first + 2 * later) / 3 for held, (first, later) in steps.items()}
        fitting = [held for held in sets if taken[held] <= share * taken[0, 1, 2, 3]]
        best = max(fitting, key=lambda held: (sum(WORTH[i] for i in held), -taken[held]))
        found = chosen_by(keep)
        assert found.layers == best and found.why.endswith(f", in {text} begin at layer {min(best)}")
    whole = {"keep": {"time": 0.8, "length": 12}}
    for plain in (chosen_by(whole, None), chosen_by(whole, dropout=0.1)):  # dropout below: nothing can be kept
        assert plain.layers == (2, 3) and "epochs" not in plain.why
    assert chosen_by(whole).layers == (1, 2, 3)


def test_a_layer_is_weighed_against_what_it_adds_to_a_later_epoch():
    layers = layer_map(model := four())
    costs = costs_of(model, layers, LayerLoraConfig(r=4).targets_in(model, layers), work=Work(4))
    later = replace(costs, whole=0.0)
    forward = [c.forward for c in costs.layers]
    assert [later.added(i) - costs.added(i) for i in range(4)] == [sum(forward[i:]) for i in range(4)]
    ratios = [c.added(2) / c.added(3) for c in (later, replace(costs, whole=1 / 3), costs)]
    assert ratios[0] < ratios[1] < ratios[2]
    one = {"keep": 1, "per": "cost"}
    assert chosen_by(one, worth=(0, 0, sum(ratios[:2]) / 2, 1)).layers == (2,)
    assert chosen_by(one | {"epochs": 3}, worth=(0, 0, sum(ratios[:2]) / 2, 1)).layers == (3,)
    assert chosen_by(one | {"epochs": 3}, worth=(0, 0, sum(ratios[1:]) / 2, 1)).layers == (2,)
    assert chosen_by(one, None, worth=(0, 0, sum(ratios[1:]) / 2, 1)).layers == (3,)


def test_a_recipe_says_how_often_its_rows_come(tmp_path):
    words = [
        f"model_name_or_path={short_llama(3)}",
        f"output_dir={tmp_path / 'out'}",
        "num_train_epochs=4",
        "max_steps=-1",
    ]

    def epochs(select, *more):
        return load_recipe("quickstart", [f"layerpeft.select={select}", *words, *more], "plan").config.choosing.epochs

    kept, chosen = "layerpeft.prefix_cache=memory", "{by: random, keep: 1, per: cost}"
    assert epochs(chosen, kept) == 4 and epochs("{by: random, keep: {time: 80%}}", kept) == 4
    assert epochs(chosen) is epochs(chosen, kept, "max_steps=9") is epochs("{by: random, keep: 1}", kept) is None
    assert epochs("{by: random, keep: 1, per: cost, epochs: 2}", kept) == 2


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"keep": {"tme": "50%"}}, "Did you mean 'time'?"),
        ({"keep": {"time": "150%"}}, "time: '150%' is not a share between 0 and 1"),
        ({"keep": {"time": 1}}, "time: 1 is not a share between 0 and 1"),
        ({"keep": {}}, "time: None is not a share"),
        ({"keep": {"time": 0.5, "length": 0}}, "length: 0 is not a whole number from 1"),
        (
            {"keep": {"memory": "8GX"}},
            "memory: '8GX' is not a share between 0 and 1 (0.5, '50%') or a number of bytes ('8GB')",
        ),
        ({"keep": {"memory": "8GB", "rows": 0}}, "rows: 0 is not a whole number from 1"),
        ({"keep": {"memory": "8GB", "precison": "bfloat16"}}, "Did you mean 'precision'?"),
        ({"keep": {"memory": "8GB", "precision": "bf16"}}, "Did you mean 'bfloat16'?"),
        ({"keep": {"time": "50%", "rows": 2}}, "rows: is of a budget of memory"),
        ({"keep": {"time": "50%", "memory": "8GB"}}, "two budgets, and a choice has one"),
        ({"keep": {"memory": "8GB"}, "pick": "bottom"}, "a budget (keep: {memory: …}) takes the best set within it"),
        ({"keep": HALF, "pick": "bottom"}, "by pick: top, not 'bottom'"),
        ({"keep": HALF, "per": "cost"}, "counts what layers cost already"),
        ({"keep": HALF, "reselect_steps": 5}, "keep: costs are weighed in a choice that is made once"),
        ({"keep": 2, "per": "cost", "reselect_steps": 5}, "per: costs are weighed in a choice that is made once"),
        ({"keep": 2, "epochs": 3}, "epochs: is of what layers cost (per: cost, keep: {time: …})"),
        ({"keep": {"memory": "8GB"}, "epochs": 3}, "epochs: is of what layers cost"),
        ({"keep": HALF, "epochs": 0}, "epochs: 0 is not a number above 0"),
        ({"keep": 2, "per": "csot"}, "Did you mean 'cost'?"),
        ({"keep": 2, "per": "cost", "pick": "uniform"}, "pick: uniform looks at none"),
        ({"per": "cost"}, "say how many with keep"),
    ],
)
def test_what_cannot_be_weighed_is_refused(select, message):
    with pytest.raises(SelectionError) as caught:
        Select.parse({"by": "snr", **select})
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [{"keep": {"tme": "50%"}}, {"kep": 3}, {"kep": 3, "reselect_steps": 5}])
def test_a_misspelt_budget_is_one_problem(keep):
    with pytest.raises(SelectionError) as caught:
        Select.parse({"by": "snr", **keep})
    assert len(caught.value.listed()) == 1


def test_a_recipe_counts_by_its_own_rows(capsys, tmp_path):
    words = [
        f"model_name_or_path={short_llama(3)}",
        f"output_dir={tmp_path / 'out'}",
        "max_length=48",
        "max_train_samples=8",
        "layerpeft.target_modules=[q_proj]",
    ]
    select = "layerpeft.select={by: gradient_norm, keep: {time: 80%}, num_batches: 1}"
    assert main(["plan", "quickstart", select, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "as many as the budget holds are assumed" in " ".join(found["assumed"])
    assert 0 < sum(row["trains"] for row in found["rows"]) < 3
    assert main(["score", "quickstart", select, *words]) == 0
    assert "of the operations of training all layers, rows of 48 tokens" in capsys.readouterr().out


def test_a_recipe_counts_memory_as_its_plan_does(capsys, tmp_path):
    words = [f"model_name_or_path={short_llama(3)}", f"output_dir={tmp_path / 'out'}", "max_length=48", "optim=sgd"]
    select = "layerpeft.select={by: gradient_norm, keep: {memory: 60MB}, num_batches: 1}"
    assert main(["plan", "quickstart", select, "max_train_samples=8", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < sum(row["trains"] for row in found["rows"]) < 3 and found["optimizer"] == "sgd"
    assert 0.95 * 60e6 < found["peak_bytes"] <= 60e6
