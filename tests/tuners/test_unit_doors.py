"""Units below a layer through every door: what is wrapped, trained, cut, planned, recorded, drawn, switched and saved."""

from __future__ import annotations

import csv
import json

import peft
import pytest
import torch

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, plan
from layerpeft.model.layers import base_of, find_module
from layerpeft.model.names import clean, lying_in
from layerpeft.model.precisions import KEPT, precision_of
from layerpeft.planning.fit import _fewer
from layerpeft.planning.plan import layers_that_train
from layerpeft.planning.trace import Step
from layerpeft.training import backward
from layerpeft.training.follower import followers_of
from layerpeft.training.report import layer_report
from tests.helpers import scheduling
from tests.helpers.loops import llama, make_batches, record
from tests.helpers.mixtures import mixture
from tests.helpers.models import MODELS, batch
from tests.helpers.quanting import BATCHES, LINEARS, logits, train, wide

LAST = {"layers": "last:1", "unit": "target"}
KINDS = {"lora": LayerLoraConfig, "galore": LayerGaloreConfig, "full": LayerFullConfig}
SELECTS = {
    "sublayer": {"by": "gradient_norm", "unit": "sublayer", "keep": 3, "num_batches": 2},
    "target": {"by": "gradient_norm", "unit": "target", "within": "kind", "keep": 1, "num_batches": 2},
}


def slow(*values):
    """A repetition."""
    return pytest.param(*values, marks=pytest.mark.slow)


def config(method, select, **options):
    options = ({} if method == "full" else {"r": 4, "target_modules": "all-linear"}) | options
    return KINDS[method](select=select, task_type="CAUSAL_LM", **options)


def wrapped(method, select, model=None, **options):
    model = wide() if model is None else model
    return layerpeft.get_peft_model(model, config(method, select, **options), batches=BATCHES)


@pytest.mark.spread(2)
@pytest.mark.parametrize(
    ("method", "unit"),
    [
        ("lora", "sublayer"),
        ("galore", "target"),
        ("full", "target"),
        slow("lora", "target"),
        slow("galore", "sublayer"),
        slow("full", "sublayer"),
    ],
)
def test_the_picked_move_and_nothing_else_does(method, unit, tmp_path):
    start = {n: p.detach().clone() for n, p in wide().named_parameters()}
    model = wrapped(method, SELECTS[unit])
    selection = record(model).selection
    assert selection.unit == unit and len(selection.targets) < 28 and selection.num_layers == len(selection.layer_names)
    inside = lying_in(selection.names)
    held = {
        clean(n).replace("modules_to_save.default.", "")
        for n, p in base_of(model).named_parameters()
        if p.requires_grad
    }
    assert held and all(inside(n) for n in held)
    assert {t for t in selection.targets} == {t for t in selection.targets if any(n.startswith(f"{t}.") for n in held)}
    train(model)  # which raises where a picked target stays as it was, or anything else moves
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(wide()))
    found = layer_report(model)
    moved = {r.layer for r in found.rows if r.change}
    assert moved == set(selection.layers) and found.unit == unit and str(found).startswith(unit)
    assert {r.layer for r in found.rows if r.steps == 4} == set(selection.layers)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "layerpeft.json").read_text())["selection"]
    assert said["unit"] == said["select"]["unit"] == unit and said["targets"] == list(selection.targets)
    assert (tmp_path / "layers.csv").read_text().splitlines()[0].startswith(f"{unit},name")
    here = logits(model)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(wide(), tmp_path)), here, atol=1e-5, rtol=1e-4)
    again = layerpeft.load(tmp_path, wide(), is_trainable=True)
    assert record(again).selection == selection
    torch.testing.assert_close(logits(again), here, atol=1e-5, rtol=1e-4)
    still = {n: p for n, p in again.named_parameters() if not p.requires_grad and ".layers." in n and "lora" not in n}
    names = {n: clean(n).removeprefix("base_model.model.") for n in still}
    assert all(torch.equal(p, start[names[n]]) for n, p in still.items() if names[n] in start and not inside(names[n]))


def test_what_waits_for_the_first_step_chooses_units():
    select = {"by": "gradient_norm", "unit": "target", "keep": 2, "num_batches": 1}
    model = layerpeft.get_peft_model(wide(), config("lora", select))
    train(model, 2)
    at_once = layerpeft.score_layers(wide(), batches=BATCHES[:1], unit="target", target_modules="all-linear")
    assert record(model).selection.layers == tuple(sorted(at_once.ranked()[:2]))


@pytest.mark.parametrize("unit", [slow("sublayer"), "target"])
def test_frozen_units_are_packed_and_the_picked_are_not(unit):
    pytest.importorskip("bitsandbytes")
    model = wrapped("lora", {"layers": "last:1", "unit": unit}, quantize_frozen="nf4")
    inside = lying_in(record(model).selection.names)
    linears = [f"model.layers.{i}.{n}" for i in range(4) for n in LINEARS]
    kinds = {n: precision_of(find_module(model, n)) for n in linears}
    assert all(kind == (KEPT if inside(n) else "nf4") for n, kind in kinds.items())
    train(model)


# ---- the cut ---------------------------------------------------------------------------------------------------------


def reached(model):
    """The modules of the layers whose output a gradient flows into."""
    seen = set()

    def watch(name):
        def hook(_module, _args, output):
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(lambda _: seen.add(name))

        return hook

    handles = [
        m.register_forward_hook(watch(clean(n)))
        for n, m in base_of(model).named_modules()
        if n.endswith(("self_attn", "mlp"))
    ]
    model(**make_batches()[0]).loss.backward()
    for handle in handles:
        handle.remove()
    return {n.removeprefix("model.layers.") for n in seen}


@pytest.mark.parametrize("checkpointing", [slow(False), True])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_backward_pass_stops_inside_of_a_layer(layer, checkpointing):
    model = llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model = wrapped("lora", {"layers": 2 * layer + 1, "unit": "sublayer"}, model)  # the MLP
    above = {f"{i}.{part}" for i in range(layer + 1, 4) for part in ("self_attn", "mlp")}
    assert reached(model) == above | {f"{layer}.mlp"}
    assert backward.where(model).layer == (layer or None)


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", slow("galore"), slow("full")])
def test_plans_count_what_is_wrapped(method):
    select = {"layers": "last:3", "unit": "target"}
    model = wrapped(method, select, llama(num_hidden_layers=2))
    found = plan(llama(num_hidden_layers=2), config(method, select), batch_size=1, length=4)
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [row.units for row in found.rows] == [(0, 7), (3, 7)]
    assert "3 of 7" in str(found) and "0 of 7" in str(found)


@pytest.mark.parametrize(
    ("select", "trained"),
    [
        ({"layers": [1, -1], "unit": "sublayer"}, [1, 7]),
        ({"by": "snr", "unit": "sublayer", "keep": 3}, [0, 1, 2]),
        ({"by": "snr", "unit": "target", "within": "kind", "keep": 2}, [0, 1]),  # of each kind
        ({"pick": "uniform", "unit": "sublayer", "keep": 2, "reselect_steps": 2}, [0, 1]),
    ],
)
def test_plans_assume_the_costliest_units(select, trained):
    found = layers_that_train(llama(), config("lora", select), Step())
    assert found[0] == trained and found[3]


def test_what_fits_takes_fewer_units():
    placed, scored = {"layers": [3, 5, 9], "unit": "target"}, SELECTS["target"] | {"keep": 4}
    assert _fewer(config("lora", placed), [3, 5, 9], 2) == {"layers": [5, 9], "unit": "target"}
    assert _fewer(config("lora", scored), range(4), 2) == scored | {"keep": 2}


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", slow("galore"), "full"])
def test_units_take_turns(method, tmp_path):
    select = {"pick": "cycle", "unit": "sublayer", "keep": 2, "reselect_steps": 2}
    model = scheduling.wrapped(method, **select)
    switcher, active = scheduling.switcher_of(model), []
    pool = scheduling.pool_tensors(model)

    def each(_step):
        trains = {t for t in pool if any(p.requires_grad for p in pool[t].values())}
        active.append({switcher.layer_of[t] for t in trains})

    scheduling.loop(model, 8, each=each)
    number = len(switcher.schedule.pool)
    assert number == (8 if method == "full" else 4)
    assert all(len(units) == 2 for units in active) and active[1] == active[2] != active[3]
    assert set().union(*active) == set(range(number))
    layerpeft.check_trained(model)
    model.save_pretrained(tmp_path)
    table = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert {row["sublayer"] for row in table} == {str(i) for i in range(number)}
    assert table[0]["name"] == "model.layers.0.self_attn"


def test_groups_take_turns_by_themselves():
    model = scheduling.wrapped(pick="uniform", unit="target", within="kind", keep=1, reselect_steps=1)
    switcher = followers_of(model)[0].schedule.switcher
    scheduling.loop(model, 6)
    names = switcher.examined.layers.names
    for entry in switcher.standing.history:
        assert sorted(names[i].rpartition(".")[2] for i in entry["layers"]) == ["q_proj", "v_proj"]
    turns = [[names[i].split(".")[2] for i in entry["layers"]] for entry in switcher.standing.history]
    assert any(a != b for a, b in turns)


@pytest.mark.parametrize("pick", [slow("cycle"), "sample"])
def test_a_resumed_run_equals_the_unbroken_one(pick, tmp_path):
    select = {"unit": "target", "within": "kind", "keep": 1, "reselect_steps": 2, "pick": pick}
    select |= {"by": "gradient_norm"} if pick == "sample" else {}
    whole = scheduling.trainer_of(scheduling.wrapped(**select), tmp_path / "whole", 6)
    whole.train()
    broken = scheduling.trainer_of(scheduling.wrapped(**select), tmp_path / "broken", 6)
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    one, other = scheduling.found(whole), scheduling.found(broken)
    assert one["standing"] == other["standing"] and one["losses"][-3:] == other["losses"][-3:]
    assert all(torch.equal(p, other["weights"][n]) for n, p in one["weights"].items())


# ---- experts ---------------------------------------------------------------------------------------------------------


def test_whole_experts_of_a_layer_are_one_target():
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"r": 2, "target_modules": [], "target_parameters": names, "task_type": "CAUSAL_LM"}
    found = layerpeft.get_peft_model(MODELS["mixtral"](), LayerGaloreConfig(select=LAST, **options))
    assert record(found).selection.targets == ("model.layers.2.mlp.experts.down_proj",)
    run(found, [batch("mixtral", MODELS["mixtral"]())] * 2)


@pytest.mark.parametrize("method", KINDS)
def test_the_picked_experts_alone_train(method, tmp_path):
    model = wrapped(method, {"layers": [0, 5], "unit": "expert"}, mixture())
    assert record(model).selection.names == ("model.layers.1.mlp.experts.0", "model.layers.2.mlp.experts.1")
    run(model, BATCHES[:3])
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(mixture(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)


def run(model, data):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for one in data:
        model(**one).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layerpeft.check_trained(model)
