"""Attention heads as units: their scores are those of their columns, and what a scale trained for each of them says."""

from __future__ import annotations

import pytest
import torch

import layerpeft
from layerpeft import LayerHeadConfig, score_layers
from layerpeft.errors import ScoreError, SelectionError
from layerpeft.model.heads import name_of
from layerpeft.model.layers import layer_map
from layerpeft.model.units import heads_in, in_units
from layerpeft.selection.select import Select
from layerpeft.tuners.trial import SPREAD, run_steps
from tests.helpers.loops import hooks, llama, make_batches, record

BATCHES = make_batches()


def scores(by, model=None, **options):
    return score_layers(model or llama(), by, unit="head", batches=BATCHES, num_batches=2, progress=False, **options)


def test_parts_of_a_projection_add_up_to_it():
    for by, options in (
        ("gradient_norm", {"exact": True}),
        ("weight_norm", {}),
        ("fisher", {"exact": True, "reduce": "sum"}),
    ):
        found = scores(by, **options)
        given = {"batches": BATCHES, "num_batches": 2, "progress": False, **options}
        whole = score_layers(llama(), by, target_modules=["o_proj"], **given)
        power = 1 if by == "fisher" else 2
        assert found.unit == "head" and len(found.values) == 16
        for layer in range(4):
            together = sum(v**power for v in found.values[4 * layer : 4 * layer + 4]) ** (1 / power)
            assert together == pytest.approx(whole.values[layer], rel=1e-5)
    weight = llama().model.layers[1].self_attn.o_proj.weight[:, 16:24]
    assert scores("weight_norm").values[6] == pytest.approx(weight.norm().item(), rel=1e-6)


def test_the_sketch_ranks_heads_as_exact_gradients_do():
    sketched, exact = scores("gradient_norm").values, scores("gradient_norm", exact=True).values
    assert sketched == pytest.approx(exact, rel=1e-4)  # eight columns lie in eight directions whole


def test_head_scale_is_the_norm_of_scales_that_were_trained_and_leaves_no_trace():
    model, steps, lr, l1 = llama().eval(), 4, 5e-3, 1e-2
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    found = scores("head_scale", model, steps=steps, lr=lr, l1=l1)
    assert found.values == scores("head_scale", model, steps=steps, lr=lr, l1=l1).values
    assert all(torch.equal(p, before[n]) and p.grad is None and p.requires_grad for n, p in model.named_parameters())
    assert not model.training and not hooks(model) and torch.equal(torch.get_rng_state(), state)
    # the same by hand: one tensor for each projection, whose columns are scaled before it
    begin = run_steps(
        model, in_units(layer_map(model), "head", heads_in(layer_map(model)))[1], BATCHES, print, steps=0, l1=0.0
    )
    assert not begin  # what trains is made when it is first used
    names = [name_of(f"model.layers.{i}.self_attn.o_proj", h) for i in range(4) for h in range(4)]
    first = run_steps(model, heads_in(layer_map(model)), BATCHES, lambda _: None, steps=1, lr=0.0, l1=0.0)
    scales = [torch.nn.Parameter(torch.cat([first[n][0] for n in names[4 * i : 4 * i + 4]])) for i in range(4)]
    assert abs(torch.cat(scales).std().item() / SPREAD - 1) < 0.3
    for layer, scale in zip(model.model.layers, scales, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * (1 + scale),))
    optimizer = torch.optim.AdamW(scales, lr, weight_decay=0.0)
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - number / steps)
        loss = model(**BATCHES[number % 2]).loss + l1 * sum(s.abs().sum() for s in scales)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    want = [s[8 * h : 8 * h + 8].norm().item() for s in scales for h in range(4)]
    assert found.values == pytest.approx(want, rel=1e-4)


def test_heads_are_chosen_by_score_and_by_name():
    choose = {"by": "head_scale", "unit": "head", "keep": 3, "num_batches": 2, "steps": 2}
    model = layerpeft.get_peft_model(llama(), LayerHeadConfig(select=choose), batches=BATCHES)
    found = record(model).selection
    assert len(found.layers) == 3 and found.unit == "head" and found.scores.by == "head_scale"
    best = sorted(range(16), key=lambda i: -found.scores.values[i])[:3]
    assert found.layers == tuple(sorted(best))
    within = {"by": "weight_norm", "unit": "head", "keep": 1, "within": "layer"}
    picked = record(layerpeft.get_peft_model(llama(), LayerHeadConfig(select=within))).selection.layers
    assert [i // 4 for i in picked] == [0, 1, 2, 3]
    for select, places in (
        ({"unit": "head", "layers": "last:4", "exclude": [[3, 1]]}, (12, 14, 15)),
        ({"unit": "head", "layers": [[-1, 0], [0, 2]]}, (2, 12)),
        ({"layers": "first:1"}, (0,)),
    ):
        assert record(layerpeft.get_peft_model(llama(), LayerHeadConfig(select=select))).selection.layers == places


def test_other_scorers_and_units_are_refused():
    for by in ("outliers", "snr", "influence", "importance"):
        with pytest.raises(SelectionError, match=f"by: {by} gives a score to .*not to heads.*head_scale"):
            Select.parse({"by": by, "unit": "head", "keep": 1})
    with pytest.raises(SelectionError, match="head_scale gives a score to heads, not to layers"):
        Select.parse({"by": "head_scale", "keep": 1})
    with pytest.raises(SelectionError, match="scores all heads there are"):
        scores("weight_norm", target_modules=["o_proj"])
    with pytest.raises(ScoreError, match="by: head_scale trains for some steps on batches of its own"):
        layerpeft.get_peft_model(llama(), LayerHeadConfig(select={"by": "head_scale", "unit": "head", "keep": 1}))
