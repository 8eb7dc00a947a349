"""Every scorer says what it costs, and takes as many forward and backward passes, and operations, as it says."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerpeft import LayerLoraConfig, Select, get_peft_model, layer_map, score_layers
from layerpeft.selection import plugins, scoring
from layerpeft.selection.select import SCORERS
from tests.helpers.hidden import llama, padded
from tests.helpers.mixtures import mixture

N, B, STEPS = 3, 2, 5  # layers, batches, steps of a run of the scorer's own
# forward and backward passes in all; of the last two, which watch training, besides its own
PASSES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    *(
        (by, {}, (0, 0))
        for by in ("depth", "random", "weight_norm", "snr", "heavy_tail", "quantization_error", "change")
    ),
    ("outliers", {"activations": False, "M": 2.0}, (0, 0)),
    ("outliers", {"M": 2.0}, (B, 0)),
    ("quantization_error", {"activations": True}, (B, 0)),
    ("salience", {}, (B, 0)),
    ("output_kl", {}, (B * (2 + N), 0)),
    *(("gradient_norm", {"statistic": s}, (B, B)) for s in ("frobenius", "nuclear", "l1", "norms", "agreement")),
    ("gradient_norm", {"exact": True}, (B, B)),
    ("gradient_norm", {"statistic": "credit", "steps": STEPS}, (B + STEPS, STEPS)),
    ("fisher", {}, (B, B)),
    *(
        (by, {}, (B, 0))
        for by in ("influence", "cka", "linearity", "intrinsic_dimension", "language", "entropy", "lens")
    ),
    ("probe", {"form": "gain", "folds": 3}, (B, 0)),
    ("representation", {}, (B, 0)),
    ("representation", {"measure": "invariance"}, (2 * B, 0)),
    ("removal", {}, (B * (2 + N), 0)),
    ("removal", {"greedy": True}, (B * (1 + N * (N + 3) // 2), 0)),
    ("routing", {"unit": "expert"}, (B, 0)),
    ("head_scale", {"unit": "head", "target_modules": None, "steps": STEPS}, (B + STEPS, STEPS)),
    ("importance", {"rollouts": 2}, (2, 0)),
    ("adapter_gradient", {}, (0, 0)),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def batches(model: nn.Module) -> list[dict[str, Any]]:
    return [padded("llama", model, seed=seed) | {"classes": torch.arange(4) % 2} for seed in range(B)]


def counted(model: nn.Module, run: Any) -> tuple[int, int]:
    """How often the attention of a layer runs, and how often a backward pass comes to it."""
    seen = [0, 0]

    def back(_gradient: torch.Tensor) -> None:
        seen[1] += 1

    def forth(_module: nn.Module, _args: Any, output: Any) -> None:
        seen[0] += 1
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(back)

    handle = model.get_submodule("model.layers.1.self_attn").register_forward_hook(forth)
    run()
    handle.remove()
    return seen[0], seen[1]


def step(model: nn.Module, one: dict[str, Any]) -> None:
    model(**one).loss.backward()


def watching(model: nn.Module, by: str, options: dict[str, Any], one: dict[str, Any]) -> None:
    """A measurement of a step of training, less the passes that the step takes by itself."""
    layers = layer_map(model)
    select = Select.parse({"by": by, "keep": 1, "reselect_steps": 1, **options})
    measurement: Any = scoring.start(model, select, layers, layers.targets, live=True)
    measurement.attach()
    step(model, one)
    measurement.next_batch()
    measurement.detach()
    measurement.result()


def test_forward_and_backward_passes(model, batches, tmp_path):
    run = get_peft_model(llama(), LayerLoraConfig(select="last:1", target_modules=["q_proj"], init_lora_weights=False))
    run.save_pretrained(tmp_path)
    for by, options, passes in PASSES:
        used = [{k: v for k, v in one.items() if k != "classes" or by == "probe"} for one in batches]
        given = {"target_modules": "all-linear", "progress": False, **options}
        given |= {"of": str(tmp_path)} if by == "change" else {}
        if plugins.traits(SCORERS, by).live_only:
            wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
            inner = wrapped.base_model.model
            own = counted(inner, partial(step, wrapped, used[0]))
            found = counted(inner, partial(watching, wrapped, by, options, used[0]))
            assert own == (1, 1)
            found = found[0] - own[0], found[1] - own[1]
        elif by == "routing":
            used = [{k: v % 64 for k, v in one.items() if k == "input_ids"} for one in used]
            experts = mixture()
            found = counted(experts, partial(score_layers, experts, by, batches=used, **given))
        else:
            found = counted(model, partial(score_layers, model, by, batches=used, **given))
        assert found == passes, (by, options)


def test_every_scorer_is_counted_and_says_what_it_costs():
    assert {by for by, _, _ in PASSES} == {*plugins.names(SCORERS)}
    for by in plugins.names(SCORERS):
        assert "Cost" in str(plugins.get(SCORERS, by).__doc__), by


def test_operations_besides_the_passes(model, batches):
    """Products alone, which is what the counter sees: solving, sorting and eigenvalues are none."""
    tokens = [int(one["attention_mask"].sum()) for one in batches]
    width, rows, folds = model.config.hidden_size, 4 * B, 2
    most = {
        "linearity": N * (4 * width**2 * sum(tokens) + 2 * width**3),
        "probe": N * 2 * folds * rows**2 * (width + rows),
        "cka": N * 4 * rows**2 * width,
        "influence": 0,
        "language": N * 2 * (rows // 2) ** 2 * width,
    }

    def operations(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    plain = [{k: v for k, v in one.items() if k != "classes"} for one in batches]
    passes = operations(lambda: [model(**one) for one in plain])
    for by, bound in most.items():
        options: dict[str, Any] = {"folds": folds} if by == "probe" else {}
        given = {"batches": batches if by == "probe" else plain, "target_modules": "all-linear", "progress": False}
        more = operations(partial(score_layers, model, by, **given, **options)) - passes
        assert 0 <= more <= bound and (more > bound / 3 or by == "influence"), (by, more, bound)
