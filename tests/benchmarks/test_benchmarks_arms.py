"""What the arms of the benchmark suite are made of, and what is counted and timed of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import chart, clock, count
from benchmarks.arm import Arm, Ready, adamw, read_arms
from benchmarks.model import Batch, Model, batches, build
from benchmarks.setting import prepare
from benchmarks.trace import traced
from layerpeft.errors import ConfigError, Problems
from layerpeft.model.precisions import precision_of
from tests.helpers.repeating import some

SMALL = Model(shape="llama-12x64")
ROWS = Batch(2, 16)


def arm(name: str, **options) -> Arm:
    problems = Problems("test")
    found = read_arms({name: options}, problems)
    problems.raise_if_any(ConfigError)
    return found[0]


def ready(name: str, setting: str = "plain", model: Model = SMALL, **options) -> Ready:
    return prepare(arm(name, **options).build(build(model)), setting)


def batch() -> dict[str, torch.Tensor]:
    return batches(SMALL, ROWS, 256)[0]


# ---- arms ------------------------------------------------------------------------------------------------------------


def test_the_large_shapes_are_those_of_the_published_models():
    published = {"llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248}
    for shape, parameters in published.items():
        model = build(Model(shape=shape, dtype="bfloat16"), "meta")
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.dtype == torch.bfloat16


def test_lisa_switches_blocks_and_lets_every_one_move():
    ours = ready("lisa", layers=3, switch_every=2)
    start = {n: p.detach().clone() for n, p in ours.model.named_parameters()}
    chosen = []
    for number in range(12):
        count.step(ours, batch(), number)
        blocks = ours.model.get_submodule("model.layers")
        chosen.append(tuple(i for i, b in enumerate(blocks) if next(b.parameters()).requires_grad))
    assert all(len(c) == 3 for c in chosen)
    assert all(chosen[i] == chosen[i + 1] for i in range(0, 12, 2)) and len(set(chosen)) >= 4
    moved = {n for n, p in ours.model.named_parameters() if not torch.equal(p, start[n])}
    seen = {i for c in chosen for i in c}
    blocks_moved = {int(n.split(".")[2]) for n in moved if n.startswith("model.layers.")}
    assert blocks_moved == seen
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= moved


def test_lisa_gives_back_the_states_of_frozen_blocks_unless_told_to_keep_them():
    kept = {}
    for keep in (False, True):
        ours = ready("lisa", layers=2, switch_every=1, keep_states=keep)
        for number in range(4):
            count.step(ours, batch(), number)
        kept[keep] = count.optimizer_bytes(ours.optimizer, ours.model)
        if not keep:
            active = sum(p.numel() for p in ours.model.parameters() if p.requires_grad)
            tensors = sum(1 for p in ours.model.parameters() if p.requires_grad)
            assert kept[keep] == 8 * active + 4 * tensors  # two moments, and the number of the step
    assert kept[True] > kept[False]


def test_galore_s_projections_count_as_optimizer_states_and_can_fall_due():
    pytest.importorskip("galore_torch")
    ours = ready("galore_torch", rank=8)
    count.step(ours, batch(), 0)
    projected = [s for s in ours.optimizer.state.values() if "projector" in s]
    assert len(projected) == 12 * 7
    # in float32 the package keeps a view of all singular vectors, and with it all of them
    inside = sum(s["projector"].ortho_matrix.untyped_storage().nbytes() for s in projected)
    assert inside > sum(s["projector"].ortho_matrix.numel() * 4 for s in projected)
    moments = sum(2 * s["exp_avg"].numel() * 4 for s in ours.optimizer.state.values())
    assert count.optimizer_bytes(ours.optimizer, ours.model) == inside + moments
    before = projected[0]["projector"].ortho_matrix.clone()
    count.step(ours, batch(), 1)
    assert torch.equal(before, projected[0]["projector"].ortho_matrix)
    ours.refresh()
    count.step(ours, batch(), 2)
    assert not torch.equal(before, projected[0]["projector"].ortho_matrix)


def test_owlore_projects_the_active_blocks_alone():
    pytest.importorskip("galore_torch")
    ours = ready("owlore", layers=2, rank=8, switch_every=50)
    count.step(ours, batch(), 0)
    assert len([s for s in ours.optimizer.state.values() if "projector" in s]) == 2 * 7


@pytest.mark.parametrize("setting", ["plain", "checkpointed"])
def test_hand_written_lora_is_plain_peft_s(setting):
    by_hand, peft = ready("torch_lora", setting), ready("peft_layers", setting)
    theirs = {n.replace("base_model.model.", "llama."): p for n, p in peft.model.named_parameters() if p.requires_grad}
    own = {n: p for n, p in by_hand.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in own.items():
            other = theirs[
                name.replace(".A.weight", ".lora_A.default.weight").replace(".B.weight", ".lora_B.default.weight")
            ]
            other.copy_(parameter.normal_(std=0.02))
    losses = [r.model(**batch()).loss for r in (by_hand, peft)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    grads = [torch.cat([p.grad.flatten() for p in group.values()]) for group in (own, theirs)]
    assert len(own) == 2 * 7 * 3 and torch.allclose(sorted_norms(own), sorted_norms(theirs), rtol=1e-4)
    assert torch.allclose(grads[0].norm(), grads[1].norm(), rtol=1e-5)


def sorted_norms(group: dict[str, nn.Parameter]) -> torch.Tensor:
    return torch.stack([p.grad.norm() for p in group.values()]).sort().values


# ---- counts and times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(["full", "peft_layers", "layerpeft", "lisa", "torch_lora"], ["layerpeft"]))
def test_tracing_counts_what_a_real_step_counts(name):
    model = Model(shape="llama-4x64")
    real = ready(name, "checkpointed", model)
    count.step(real, batch(), 0)
    real = count.counts(real, batch(), 1)
    shadow = traced(arm(name), model, ROWS, lambda r: prepare(r, "checkpointed"))
    for key in ("trainable", "flops", "gradient_bytes"):
        assert shadow[key] == real[key], key
    for key in ("kept_bytes", "peak_bytes", "optimizer_bytes", "weight_bytes"):
        assert shadow[key] == pytest.approx(real[key], rel=0.05), key


def test_operations_are_those_of_the_matrix_products():
    linear, x = nn.Linear(6, 5, bias=False), torch.randn(7, 6)
    assert count.counted(lambda: linear(x), [linear.weight, x]).flops == 2 * 7 * 6 * 5
    query = torch.randn(1, 2, 4, 8)
    attention = nn.functional.scaled_dot_product_attention
    assert count.counted(lambda: attention(query, query, query), [query]).flops == 2 * (2 * 2 * 4 * 4 * 8)


def test_live_bytes_are_those_alive_at_once():
    x = torch.zeros(256)

    def one_after_the_other() -> None:
        for _ in range(3):
            _ = x + 1

    def all_at_once() -> None:
        held = [x + 1 for _ in range(3)]
        assert held

    assert count.counted(all_at_once, [x]).peak == 3 * 1024
    assert count.counted(one_after_the_other, [x]).peak <= 2 * 1024


def test_numbers_without_a_dimension_of_tokens_are_told_from_activations():
    weight, x = torch.randn(6, 5), torch.randn(7, 6)
    with count.WithoutTokens([weight, x], (7,)) as watch:
        y = x @ weight  # (7, 5): an activation
        gradient = x.T @ y  # (6, 5)
        del gradient
        sketch = torch.randn(2, 7) @ y  # (2, 5)
    assert watch.peak == 30 and sketch.shape == (2, 5)


def test_optimizer_bytes_are_what_the_state_holds():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert count.optimizer_bytes(optimizer, model) == 2 * 4 * (12 + 3) + 4 * 2
    assert count.size([model.weight, model.weight.t(), model.bias]) == 4 * (12 + 3)


def test_arms_take_turns_and_ratios_are_taken_round_by_round():
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = clock.interleaved(steps, rounds=8, seed=0)
    turns = [tuple(calls[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 2
    assert all(len(values) == 8 for values in found.values())
    # the machine was twice as slow in the second round; the ratio does not see it
    ratios = clock.ratios({"a": [1.0, 2.0, 1.0], "b": [0.5, 1.0, 0.5]}, "a")
    assert ratios["b"] == {"median": 0.5, "lower": 0.5, "upper": 0.5, "min": 0.5, "max": 0.5}
    assert clock.ratios({"a": [1.0, 2.0, 1.0], "b": [0.5, 1.0, 0.5]}, "a", paired=False)["b"]["max"] == 1.0


def test_one_round_has_a_spread_of_nothing():
    assert clock.spread([2.0]) == {"median": 2.0, "lower": 2.0, "upper": 2.0, "min": 2.0, "max": 2.0}


def test_full_fine_tuning_trains_everything_and_adamw_takes_what_trains():
    ours = ready("full")
    assert all(p.requires_grad for p in ours.model.parameters())
    ours.model.requires_grad_(False)
    ours.model.get_parameter("lm_head.weight").requires_grad_(True)
    assert len(adamw(ours.model).param_groups[0]["params"]) == 1


@pytest.mark.pictures
def test_growth_is_drawn_with_a_line_per_arm(tmp_path):
    counts = {"flops": 10**12, "peak_bytes": 2**30}
    points = [{"value": v, "arms": {"a": counts, "b": counts}} for v in (1, 2, 4)]
    path = chart.lines({"rank": {"axis": "rank", "doubling": True, "points": points}}, "title", tmp_path / "g.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_qlora_packs_every_linear_of_the_layers_and_trains_over_all_of_them():
    pytest.importorskip("bitsandbytes")
    ours = ready("qlora")
    names = [n for n, m in ours.model.named_modules() if n.endswith("base_layer")]
    assert len(names) == 12 * 7
    assert {precision_of(ours.model.get_submodule(n)) for n in names} == {"nf4"}
    start = {n: p.detach().clone() for n, p in ours.model.named_parameters() if ".lora_B" in n}
    count.step(ours, batch(), 0)
    assert len(start) == 84 and all(
        not torch.equal(p, start[n]) for n, p in ours.model.named_parameters() if n in start
    )
    frozen = ready("layerpeft", quantize_frozen="int8", select="last:3")
    packed = [n for n, m in frozen.model.named_modules() if precision_of(m) == "int8"]
    assert len(packed) == 9 * 7
