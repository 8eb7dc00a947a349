"""Rules that look at more than one layer at a time, and how much layers do the same."""

from __future__ import annotations

import random

import pytest
import torch

from layerpeft import LayerLoraConfig, Scores, Select, get_peft_model, plan, score_layers
from layerpeft.errors import SelectionError
from layerpeft.selection.picks import complement, grow, outside
from layerpeft.selection.schedule import Turn
from tests.helpers.loops import llama, make_batches


def overlapping(seed: int, count: int = 7) -> tuple[list[float], torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.rand(count, 9, generator=draw, dtype=torch.float64), dim=1)
    return (torch.rand(count, generator=draw, dtype=torch.float64) + 0.1).tolist(), features @ features.T


@pytest.mark.parametrize("seed", range(6))
def test_every_step_takes_what_makes_the_determinant_largest(seed):
    scores, overlaps = overlapping(seed)
    weighed = torch.tensor(scores)[:, None] * overlaps * torch.tensor(scores)
    taken: list[int] = []
    for _ in range(5):
        rest = [i for i in range(7) if i not in taken]
        taken.append(max(rest, key=lambda i: torch.det(weighed[[*taken, i]][:, [*taken, i]]).item()))
    assert complement.joint(scores, overlaps.tolist(), 5, complement.Options()) == taken


def test_of_two_that_do_the_same_one_is_enough():
    same = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.99], [0.0, 0.99, 1.0]]
    assert sorted(complement.joint([1.0, 3.0, 2.9], same, 2, complement.Options())) == [0, 1]
    apart = [[float(i == j) for j in range(3)] for i in range(3)]
    assert sorted(complement.joint([1.0, 3.0, 2.9], apart, 2, complement.Options())) == [1, 2]
    assert complement.joint([1.0] * 3, [[1.0] * 3] * 3, None, complement.Options()) == [0, 1, 2]
    with pytest.raises(SelectionError, match="negative"):
        complement.joint([-1.0], [[1.0]], 1, complement.Options())


def parts_of(model, batch):
    """Gradients of the outputs, and the inputs, of every linear in a layer: (tokens, out), (tokens, in)."""
    inputs, outputs, handles = {}, {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def watch(_module, args, y, name=name):
                inputs[name], outputs[name] = args[0].detach().flatten(0, 1), y
                y.retain_grad()

            handles.append(module.register_forward_hook(watch))
    model(**batch).loss.backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return {name: (y.grad.flatten(0, 1), inputs[name]) for name, y in outputs.items()}


def test_overlaps_are_those_of_the_gradients_themselves():
    """Against the gradient that each token gives each weight, formed one by one."""
    model, batches = llama(num_hidden_layers=3), make_batches()[:2]
    found = score_layers(model, "gradient_norm", batches=batches, pick="complement", target_modules="all-linear")
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for batch in batches:
        seen = parts_of(model, batch)
        kernels = []
        for layer in range(3):
            parts = [torch.einsum("to,ti->toi", *seen[n]).flatten(1) for n in seen if f".layers.{layer}." in n]
            features = torch.cat(parts, 1).double()
            centred = features - features.mean(0)
            kernels.append(centred @ centred.T)
        for i in range(3):
            for j in range(3):
                expected[i, j] += (kernels[i] * kernels[j]).sum() / (kernels[i].norm() * kernels[j].norm()) / 2
    assert torch.allclose(torch.tensor(found.overlaps, dtype=torch.float64), expected, atol=1e-5)
    assert expected[0, 2] < expected[1, 2] < 1  # neighbours do more of the same


def test_scores_keep_their_overlaps_and_those_without_say_so(tmp_path):
    model, batches = llama(num_hidden_layers=4), make_batches()[:2]
    plain = score_layers(model, "gradient_norm", batches=batches)
    found = score_layers(model, "gradient_norm", batches=batches, pick="complement")
    assert found.values == plain.values and plain.overlaps == () and "overlaps" not in plain.to_dict()
    found.save(tmp_path / "scores.json")
    again = Scores.load(tmp_path / "scores.json")
    assert again == found and len(again.overlaps) == 4
    select = {"by": str(tmp_path / "scores.json"), "keep": 2, "pick": "complement"}
    record = get_peft_model(model, LayerLoraConfig(select=select, r=4)).peft_config["default"]._layerpeft
    live = LayerLoraConfig(select={**select, "by": "gradient_norm", "num_batches": 2}, r=4, batches=batches)
    same = get_peft_model(llama(num_hidden_layers=4), live).peft_config["default"]._layerpeft
    assert record.selection.layers == same.selection.layers and same.selection.scores.overlaps == found.overlaps
    with pytest.raises(SelectionError, match="do not hold; score again with pick: complement"):
        get_peft_model(llama(num_hidden_layers=4), LayerLoraConfig(select={**select, "by": plain}, r=4))
    with pytest.raises(SelectionError, match="needs overlaps of layers, which by: gradient_norm measures, not snr"):
        Select.parse({**select, "by": "snr"})


@pytest.mark.parametrize("seed", range(5))
def test_outside_takes_the_best_split_between_both_ends(seed):
    draw = random.Random(seed)
    scores = [draw.random() for _ in range(9)]
    for keep in range(1, 10):
        splits = [[*range(a), *range(9 - keep + a, 9)] for a in range(keep + 1)]
        splits = [s for s in splits if keep == 1 or (0 in s and 8 in s)]
        found = outside.pick(scores, keep, 0, outside.Options())
        assert sum(scores[i] for i in found) == max(sum(scores[i] for i in s) for s in splits) and found in splits
    assert outside.pick([1.0] * 12, 5, 0, outside.Options()) == [0, 8, 9, 10, 11]


def test_layers_join_from_the_output_down_and_none_is_frozen_again():
    scores, chosen, seen = tuple(map(float, range(7))), (), []
    for window in range(5):
        taken = grow.again(Turn(window, 0, 2, scores, chosen), grow.Options())
        chosen = taken.positions
        seen.append(sorted(chosen))
    assert seen == [[5, 6], [3, 4, 5, 6], [1, 2, 3, 4, 5, 6], list(range(7)), list(range(7))]
    other = grow.again(Turn(1, 0, 2, (9.0, *scores[1:]), (6, 5)), grow.Options(most=3))
    assert sorted(other.positions) == [0, 5, 6]  # scores that have changed take nothing back


@pytest.mark.parametrize("keep", [2, "50%"])
def test_what_trains_in_the_end_is_not_less_than_what_begins(keep):
    select = {"by": "depth", "keep": keep, "pick": "grow", "most": 1, "reselect_steps": 1}
    with pytest.raises(SelectionError, match="most: 1 layers in the end are fewer than the 2 of keep"):
        get_peft_model(llama(), LayerLoraConfig(select=select, r=4))


def test_a_staged_run_trains_as_it_says():
    select = {"by": "depth", "keep": 1, "pick": "grow", "most": 3, "reselect_steps": 1}
    model = get_peft_model(llama(), LayerLoraConfig(select=select, r=4, task_type="CAUSAL_LM"))
    said = "1 of 4 layers, and 1 more every step by depth (pick: grow)"
    assert model.peft_config["default"]._layerpeft.selection.why == said
    assert "3 of 4 layers train in the end" in str(plan(llama(), LayerLoraConfig(select=select, r=4)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for batch in make_batches()[:4]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    history = model.peft_config["default"]._layerpeft.schedule.standing.history
    assert [row["layers"] for row in history][:4] == [[3], [2, 3], [1, 2, 3], [1, 2, 3]][: len(history)] and len(
        history
    ) > 2
