"""Layers that are chosen again during training: what trains when, what the optimizer holds, and what a resumed run is."""

from __future__ import annotations

import copy
import csv
import math
import pickle
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, get_peft_model, layer_report, score_layers
from layerpeft.errors import ConfigError, RecipeError, SaveError, SelectionError, TrainingError
from layerpeft.recipe.comparing.arms import parse_arms
from layerpeft.recipe.comparing.entries import entries_of
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import Setup
from layerpeft.saving.manifest import read_manifest
from layerpeft.selection.select import Select
from layerpeft.training.optimizer_states import optimizer_bytes
from tests.helpers.loops import layers_of, llama
from tests.helpers.scheduling import METHODS, found, loop, pool_tensors, rows, switcher_of, trainer_of, wrapped

CYCLE = {"pick": "cycle", "keep": 1, "reselect_steps": 2}
UNIFORM = {"pick": "uniform", "keep": 1, "reselect_steps": 2}
BY_GRADIENT = {"by": "gradient_norm", "keep": 1, "reselect_steps": 3}


def active(model):
    return layers_of(n for n, p in model.named_parameters() if p.requires_grad)


def history(model):
    return [(h["step"], h["layers"]) for h in switcher_of(model).plain()["history"]]


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("select", [UNIFORM, BY_GRADIENT, UNIFORM | {"always": -1, "state": "clear"}], ids=str)
def test_only_the_active_layers_train_in_every_window(method, select):
    model = wrapped(method, **select)
    assert active(model) == {0, 1, 2, 3}  # an optimizer that is built now holds them all
    seen, before = [], values(model)

    def each(step):
        nonlocal before
        now = values(model)
        seen.append({layer for n in now if not torch.equal(now[n], before[n]) for layer in layers_of([n])})
        before = now

    loop(model, 9, each=each)
    switches = dict(history(model))
    want = [set(switches[max(s for s in switches if s <= step)]) for step in range(9)]
    assert seen == want
    assert len(switches) > 2 and all(3 in w for w in want if "always" in select)
    check_trained(model)
    report = {r.layer: r.steps for r in layer_report(model).rows}
    assert report == {i: sum(i in s for s in seen) for i in range(4)}


def test_draws_are_the_same_in_another_run_and_differ_between_windows():
    first, second = (wrapped(**UNIFORM) for _ in range(2))
    for model in (first, second):
        loop(model, 12)
    assert history(first) == history(second) and len({tuple(h[1]) for h in history(first)}) > 1
    other = wrapped(**UNIFORM, seed=1)
    loop(other, 12)
    assert history(other) != history(first)


def test_frozen_layers_are_scored_as_if_they_trained():
    model = wrapped("lora", **BY_GRADIENT | {"reselect_steps": 2})
    batches, scored = [], []

    def keep(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            batches.append({k: v for k, v in kwargs.items() if v is not None})
            scored.append(copy.deepcopy(module.state_dict()))

    model.base_model.model.register_forward_pre_hook(keep, with_kwargs=True)
    model.eval()
    loop(model, 4, accumulate=2)
    told = switcher_of(model).plain()
    assert told["measured"] == 3 and [h["measured"] for h in told["history"]] == [1, 2, 3]
    for switch, micro in ((0, 0), (1, 2), (2, 6)):  # the first step itself, then the last one before every switch
        trained = wrapped("lora", **BY_GRADIENT)
        trained.base_model.model.load_state_dict(scored[micro])
        bare = trained.merge_and_unload()
        scores = score_layers(
            bare, batches=batches[micro : micro + 2], target_modules=["q_proj", "v_proj"], num_batches=2
        )
        assert told["history"][switch]["scores"] == pytest.approx(list(scores.values), rel=0.2)


@pytest.mark.spread(2)
@pytest.mark.parametrize("state", ["keep", "clear", "offload"])
def test_what_the_optimizer_holds_follows_the_policy(state):
    model = wrapped("lora", **CYCLE, state=state)
    sizes, counts = [], []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    def each(step):
        sizes.append(optimizer_bytes([optimizer]))
        counts.append({int(s["step"]) for s in optimizer.state.values()})

    loop(model, 24, optimizer, each=each)
    group = next(g for t, g in pool_tensors(model).items() if ".0." in t)
    layer = sum(2 * p.numel() * 4 + 4 for t, g in pool_tensors(model).items() if ".0." in t for p in g.values())
    assert group and layer
    if state == "keep":
        assert sizes[-1] == 4 * layer and sizes == sorted(sizes)
    else:
        assert max(sizes) <= layer  # just after a switch there may be none at all
    if state == "clear":
        assert max(map(max, filter(None, counts))) <= 2 * max(
            sum(1 for _ in group) for group in _runs([h[1] for h in history(model)])
        )
    else:
        assert max(map(max, filter(None, counts))) > 4  # moments go on where they stopped
    assert bool(switcher_of(model).store) == (state == "offload")


def _runs(items):
    out = [[items[0]]]
    for item in items[1:]:
        if item == out[-1][-1]:
            out[-1].append(item)
        else:
            out.append([item])
    return out


def test_offloaded_moments_equal_those_that_were_kept():
    kept, away = (wrapped("lora", **UNIFORM, state=s) for s in ("keep", "offload"))
    for model in (kept, away):
        loop(model, 15)
    assert all(torch.equal(p, dict(away.named_parameters())[n]) for n, p in kept.named_parameters())


def test_warm_up_trains_the_whole_pool_and_scores_its_last_step():
    model = wrapped("lora", **BY_GRADIENT, warmup_steps=2)
    seen = []
    loop(model, 6, each=lambda step: seen.append(active(model)))
    assert seen[0] == {0, 1, 2, 3} and len(seen[1]) == 1
    assert history(model)[0][0] == 2 and switcher_of(model).plain()["history"][0]["measured"] == 1


def test_scores_have_a_clock_of_their_own():
    model = wrapped("lora", **BY_GRADIENT | {"reselect_steps": 1, "rescore_steps": 4})
    loop(model, 9)
    told = switcher_of(model).plain()
    assert told["measured"] == 3 and [h["step"] for h in told["history"]] == list(range(10))
    assert [h["step"] for h in told["history"] if h["scores"]] == [0, 4, 8]


def test_memory_averages_what_was_measured():
    plain, ema = (wrapped("lora", **BY_GRADIENT, **extra) for extra in ({}, {"memory": "ema", "decay": 0.75}))
    for model in (plain, ema):
        loop(model, 4)
    one, two = (switcher_of(m).plain()["history"] for m in (plain, ema))
    assert one[0]["scores"] == two[0]["scores"]
    want = [0.75 * a + 0.25 * b for a, b in zip(one[0]["scores"], one[1]["scores"], strict=True)]
    assert two[1]["scores"] == pytest.approx(want)


def test_counts_let_a_rule_see_how_often_each_layer_was_chosen():
    model = wrapped("lora", **BY_GRADIENT, memory="counts")
    loop(model, 12)
    windows = [h[1] for h in history(model)]
    assert (
        len(windows) == 5 and windows[1:] == [windows[0]] * 4
    )  # the first one by its score, and then the most chosen one
    lowest = wrapped("lora", **BY_GRADIENT | {"pick": "bottom"}, memory="counts")
    loop(lowest, 12)
    assert sorted(h[1] for h in history(lowest)[:4]) == [[0], [1], [2], [3]]  # always one that was chosen the least


def test_the_backward_pass_stops_at_the_lowest_active_layer():
    model = wrapped("lora", **UNIFORM)
    calls = []

    def watch(number, out):
        if out[0].requires_grad:
            out[0].register_hook(lambda _: calls.append(number))

    for number, block in enumerate(model.base_model.model.model.layers):
        block.self_attn.register_forward_hook(lambda m, a, out, number=number: watch(number, out))
    seen = []

    def each(step):
        seen.append(min(calls))
        calls.clear()

    loop(model, 8, each=each)
    switches = dict(history(model))
    assert seen == [min(switches[max(s for s in switches if s <= step)]) for step in range(8)]


def test_a_layer_that_comes_back_gets_a_new_subspace():
    from layerpeft.tuners.galore.projection import projections, state_of

    model = wrapped("galore", **CYCLE)
    loop(model, 20)
    windows = [h[1] for h in history(model)]
    entered = {
        i: sum(i in w and (n == 0 or i not in windows[n - 1]) for n, w in enumerate(windows[:-1])) for i in range(4)
    }
    for name, layer in projections(model.base_model.model, "default"):
        (layer_number,) = layers_of([f".{name}"])
        assert state_of(layer).refreshes >= entered[layer_number] > 0
        assert state_of(layer).steps == sum(2 for w in windows[:-1] if layer_number in w)


@pytest.mark.parametrize("between", [False, True], ids=["after the step", "between forward and backward"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.spread(4)
def test_a_reference_from_the_same_model_lets_nothing_else_train(method, between):
    """DPO, KTO and GRPO switch the adapter off and on again in every step, and PEFT then lets gradients into all of it."""
    plain, asked = wrapped(method, **CYCLE), wrapped(method, **CYCLE)
    ids = rows()[0]["input_ids"][None]

    def reference(*_):
        if torch.is_grad_enabled():
            with asked.disable_adapter(), torch.no_grad():
                asked(ids)

    seen = []
    for model in (plain, asked):
        model.gradient_checkpointing_enable()
    if between:
        asked.register_forward_hook(reference)
    loop(plain, 7)
    loop(asked, 7, each=lambda step: (seen.append(active(asked)), reference()))
    assert all(torch.equal(p, dict(asked.named_parameters())[n]) for n, p in plain.named_parameters())
    assert all(len(s) == 1 for s in seen) and active(asked) == active(plain)


def test_a_tensor_that_moves_while_it_is_off_is_found():
    model = wrapped("lora", **UNIFORM | {"reselect_steps": 50})
    loop(model, 2)
    (on,) = active(model)
    off = next(g for t, g in pool_tensors(model).items() if f".{(on + 1) % 4}." in t)
    with torch.no_grad():
        next(iter(off.values())).add_(1e-6)
    with pytest.raises(TrainingError, match="was never switched on and changed"):
        check_trained(model)


def test_an_optimizer_that_lacks_part_of_the_pool_is_refused():
    model = wrapped("lora", **CYCLE)
    some = [p for n, p in model.named_parameters() if p.requires_grad and ".3." not in n]
    with pytest.raises(TrainingError, match="not in the optimizer"):
        loop(model, 12, torch.optim.AdamW(some, 1e-2))


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize("select", [UNIFORM, BY_GRADIENT], ids=["uniform", "gradient"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("state", ["clear", "offload"])
def test_a_resumed_run_equals_the_unbroken_one(method, select, state, tmp_path):
    torch.manual_seed(3)
    whole = trainer_of(wrapped(method, **select, state=state), tmp_path / "whole")
    whole.train()
    torch.manual_seed(9)
    model = wrapped(method, model=llama(), **select, state=state)
    again = trainer_of(model, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    one, two = found(whole), found(again)
    assert one["standing"] == two["standing"] and one["losses"][-6:] == two["losses"][-6:]
    for part in ("weights", "states"):
        assert set(one[part]) == set(two[part])
        assert not [
            n for n, v in one[part].items() if not torch.equal(torch.as_tensor(v), torch.as_tensor(two[part][n]))
        ]


def test_another_schedule_is_refused_on_resume(tmp_path):
    trainer_of(wrapped(**UNIFORM), tmp_path, steps=3).train()
    other = trainer_of(wrapped(**UNIFORM | {"reselect_steps": 3}), tmp_path / "b")
    with pytest.raises(SelectionError, match="reselect_steps: 2 then, 3 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_other_options_are_refused_on_resume(tmp_path):
    wrapped(**UNIFORM).save_pretrained(tmp_path)
    config = METHODS["lora"](UNIFORM)
    config.lora_alpha = 32
    other = get_peft_model(llama(), config)
    with pytest.raises(SelectionError, match="lora_alpha: 8 then, 32 now"):
        other.load_adapter(str(tmp_path), "default")


def test_the_pool_and_what_trains_at_a_time_are_said(caplog):
    with caplog.at_level("INFO", logger="layerpeft"):
        model = wrapped(**UNIFORM | {"keep": 2})
    layer = sum(p.numel() for t, g in pool_tensors(model).items() if ".0." in t for p in g.values())
    said = [r.getMessage() for r in caplog.records]
    assert f"{4 * layer:,} weights in a pool of 4 layers, at most {2 * layer:,} of them train at a time" in said


def test_a_folder_without_a_schedule_is_refused(tmp_path):
    plain = get_peft_model(
        llama(), LayerLoraConfig(select="0-3", r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    plain.save_pretrained(tmp_path)
    with pytest.raises(SaveError, match="holds no schedule"):
        wrapped(**UNIFORM).load_adapter(str(tmp_path), "default")


def test_the_saved_folder_is_a_stock_adapter_with_the_history(tmp_path):
    model = wrapped("lora", **UNIFORM)
    loop(model, 5)
    model.save_pretrained(tmp_path)
    ids = rows()[0]["input_ids"][None]
    loaded = layerpeft.load(tmp_path, llama())
    assert torch.allclose(loaded.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)
    manifest = read_manifest(tmp_path)
    assert manifest["schedule"]["history"]


def test_a_second_training_goes_on_with_the_whole_pool(tmp_path):
    model = wrapped("lora", **UNIFORM)
    trainer_of(model, tmp_path / "a", steps=4).train()
    assert active(model) == {0, 1, 2, 3}
    trainer = trainer_of(model, tmp_path / "b", steps=4)
    trainer.train()
    assert len(history(model)) == 5 and sum(len(g["params"]) for g in trainer.optimizer.param_groups) == 16


def test_copies_and_pickles_stand_on_their_own():
    model = wrapped("lora", **BY_GRADIENT)
    loop(model, 2)  # the third step is going to be measured
    twin = copy.deepcopy(model)
    stood = switcher_of(twin).plain()
    loop(model, 4)
    assert switcher_of(twin).plain() == stood and switcher_of(twin) is not switcher_of(model)
    held = [p for group in pool_tensors(twin).values() for p in group.values()]  # resting ones included
    loop(twin, 4, torch.optim.AdamW(held, 1e-2))
    check_trained(twin)
    assert pickle.loads(pickle.dumps(model)) is not None


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"by": "gradient_norm", "keep": 1, "rescore_steps": 5}, "rescore_steps: .* needs reselect_steps"),
        ({"pick": "uniform", "keep": 1, "reselect_steps": 0}, "reselect_steps: 0 is not a whole number from 1"),
        ({"pick": "uniform", "reselect_steps": 2}, "keep: missing"),
        ({**UNIFORM, "state": "drop"}, "state"),
        ({**UNIFORM, "memory": "sum"}, "memory"),
        ({**UNIFORM, "decay": 0.5}, "decay: is of memory: ema"),
        ({**UNIFORM, "always": "last:99%+x"}, "always"),
        ({"pick": "cycle", "keep": 1}, "say how often with reselect_steps"),
    ],
)
def test_schedules_that_cannot_be_are_refused(select, words):
    with pytest.raises(SelectionError, match=words):
        Select.parse(select)


def test_what_has_no_meaning_with_a_schedule_is_refused():
    config = LayerLoraConfig(select=UNIFORM, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="no stock config"):
        config.resolve(llama())
    with pytest.raises(SelectionError, match="4 layers are asked for"):
        wrapped("lora", **UNIFORM | {"keep": 4, "always": 0})
    with pytest.raises(ConfigError, match="bias='all'"):
        get_peft_model(llama(), LayerLoraConfig(select=UNIFORM, target_modules=["q_proj"], bias="all"))


class Logs(TrainerCallback):
    """What a tracker would be told, and what the gradients were before anything clipped them."""

    def __init__(self):
        self.told, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append(dict(logs))


def test_trackers_hear_of_every_switch_and_of_gradients_before_clipping(tmp_path):
    model = wrapped("lora", **BY_GRADIENT, log_gradients=True)
    logs = Logs()
    trainer = trainer_of(model, tmp_path, steps=7, max_grad_norm=1e-3)
    trainer.args.report_to = ["a tracker"]
    trainer.callback_handler.callbacks.insert(2, logs)
    trainer.train()
    told = [t for t in logs.told if "loss" in t]
    switched = [t for t in told if "layers/active" in t]
    assert len(told) == 7 and len(switched) == 3  # chosen before step 0, and after steps 3 and 6
    for one, (_, layers) in zip(switched, history(model), strict=True):
        assert [i for i in range(4) if one[f"layers/on/{i}"]] == layers and one["layers/lowest"] == min(layers)
        assert all(one[f"layers/score/{i}"] > 0 for i in range(4))
    for one in told[1:]:  # in the first step the whole pool had gradients when they were seen
        norms = [v for k, v in one.items() if k.startswith("layers/grad_norm/")]
        assert math.hypot(*norms) == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.pictures
def test_the_folder_has_the_heat_map_and_a_row_per_switch_and_layer(tmp_path):
    model = wrapped("lora", **UNIFORM)
    loop(model, 5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "layers.csv", newline="") as file:
        table = list(csv.DictReader(file))
    told = switcher_of(model).plain()["history"]
    assert len(table) == 4 * len(told) + 4
    for number, entry in enumerate(told):
        mine = table[4 * number : 4 * number + 4]
        assert [int(r["layer"]) for r in mine if r["chosen"] == "true"] == entry["layers"]
        assert all(int(r["step"]) == entry["step"] for r in mine)
    assert sum(int(r["steps"]) for r in table[-4:]) == 5 and sum(bool(r["optimizer_bytes"]) for r in table) == 8


def test_compare_sets_a_schedule_beside_as_many_random_and_fixed_layers():
    recipe = load_recipe("grass", ["layerpeft.select.keep=2"])
    model, setup = llama(), Setup(recipe, None, None, None, None)
    found = entries_of(setup, model, parse_arms("random:2,last,last:1,all"), {})
    names = ["adaptive every 20", "random:1", "random:2", "last", "last:1", "all"]
    assert [e.arm for e in found] == names and {e.num_layers for e in found} == {4}
    own, *draws = (Select.parse(e.select) for e in found[:3])
    assert own == Select.parse(recipe.select)
    for seed, draw in enumerate(draws, 1):
        assert (draw.pick, draw.keep, draw.reselect_steps, draw.state, draw.seed) == ("uniform", 2, 20, "offload", seed)
    assert [e.select["layers"] for e in found[3:]] == [[2, 3], [3], [0, 1, 2, 3]]
    assert [e.count for e in found] == [2, 2, 2, 2, 1, 4] and found[1].at(3).select == {**found[1].select, "keep": 3}
    auto = replace(recipe, config=recipe.config.changed(select={**BY_GRADIENT, "keep": "auto"}))
    with pytest.raises(RecipeError, match="compare with keep: N"):
        entries_of(replace(setup, recipe=auto), model, parse_arms("last"), {})
