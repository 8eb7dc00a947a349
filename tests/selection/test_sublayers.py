"""Scores of the parts of layers from forward passes: the stream as a hand-written pass has it, and parts that are left out."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

from layerpeft import LayerLoraConfig, Select, get_peft_model, layer_map, score_layers
from layerpeft.errors import ScoreError
from layerpeft.model.names import clean, lying_in
from layerpeft.model.targets import match_targets
from layerpeft.model.units import in_units
from layerpeft.selection import scoring
from layerpeft.selection.scorers import intrinsic_dimension, language, probe, representation
from layerpeft.selection.states import cosines
from tests.helpers.hidden import llama, looks, padded, same
from tests.helpers.models import MODELS, NanoGPT, batch
from tests.helpers.repeating import some
from tests.model.test_architectures import CASES, build, targets_of

PARTS: dict[str, Any] = {"unit": "sublayer", "target_modules": "all-linear", "progress": False}


def turned(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((1 - cosines(before.flatten(0, -2), after.flatten(0, -2))).mean())


def test_the_stream_of_blocks_that_norm_what_a_part_reads():
    model, want = NanoGPT().eval(), []
    one = batch("nanogpt", model)
    with torch.no_grad():
        x = model.transformer.wte(one["input_ids"]) + model.transformer.wpe(torch.arange(8))
        for block in model.transformer.h.children():
            middle = x + block.attn(block.ln_1(x))
            after = middle + block.mlp(block.ln_2(middle))
            want += [turned(x, middle), turned(middle, after)]
            x = after
    assert score_layers(model, "influence", batches=[one], **PARTS).values == pytest.approx(want, rel=1e-4)
    alone = score_layers(model, "influence", batches=[one], **PARTS | {"target_modules": ["c_attn"]})
    assert alone.values == pytest.approx(want[::2], rel=1e-4)  # the MLP holds no target, and is a part all the same


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "bert", "opt"])
def test_the_stream_of_blocks_of_other_kinds(name):
    """Norms after a part, parallel parts, norms of the stream, and parts of several modules."""
    model = MODELS[name]().eval()
    one = batch(name, model, rows=3, length=9)
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    block = model.get_submodule(layer_map(model).names[1])

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [*args, *kwargs.values(), *(output if isinstance(output, tuple) else [output])]
        states = [t for t in tensors if torch.is_tensor(t) and t.is_floating_point() and t.shape[-1] == 32]
        seen.setdefault(module, []).extend(t.clone() for t in states)

    for module in block.modules():
        module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**one)
    x, out = seen[block][0], seen[block][-1]
    if name == "gemma2":
        middle = x + seen[block.post_attention_layernorm][-1]
    elif name == "bert":
        middle = seen[block.attention][-1]
    elif name == "opt":
        middle = x + seen[block.self_attn][-1].view_as(x)
    else:
        middle = x + seen[block.attention][-1]
    want = [turned(x, middle), turned(middle, out)]
    if name == "gpt_neox":  # both read the same
        want[1] = turned(x, x + seen[block.mlp][-1])
    got = score_layers(model, "influence", batches=[one], **PARTS)
    assert got.values[2:4] == pytest.approx(want, rel=1e-4)


def test_parts_are_left_out_by_silencing_what_writes_to_the_stream():
    model, batches = llama(), [padded("llama", llama(), seed=seed) for seed in range(2)]
    want = []
    for layer in range(3):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            left = copy.deepcopy(model)
            left.get_submodule(f"model.layers.{layer}.{part}").weight.data.zero_()
            distances = []
            for one in batches:
                counted = torch.cat([one["labels"][:, 1:] != -100, torch.zeros(4, 1, dtype=torch.bool)], 1)
                with torch.no_grad():
                    a, b = model(**one).logits[counted], left(**one).logits[counted]
                distances.append((a - b).double().norm(dim=-1))
            want.append(float(torch.cat(distances).mean()))
    got = score_layers(model, "removal", batches=batches, distance="norm", **PARTS)
    assert got.values == pytest.approx(want, rel=1e-4) and got.unit == "sublayer"


FEW = [("llama", None), ("t5", None)]
REFUSED = {"zamba2": ("do not hand on one stream", "not known which matrix"), "llama_bare": ("holds no logits",)}
OPTIONS: dict[str, dict[str, Any]] = {
    "influence": {},
    "removal": {"distance": "norm"},
    "lens": {"measure": "kl"},
    "representation": {},
    "intrinsic_dimension": {"tokens": 40},
    "entropy": {"clusters": 4},
    "probe": {"folds": 2},
    "language": {"measure": "gap"},
}


@pytest.mark.spread(2)
@pytest.mark.parametrize(("name", "stack"), some(CASES, FEW))
def test_finite_deterministic_and_without_a_trace(name, stack):
    model = build(name).eval()
    targets = {**PARTS, **targets_of(name), "stack": stack}
    count = len(in_units(layer_map(model, stack), "sublayer", layer_map(model, stack).targets)[0])
    before = looks(model)
    for by, options in OPTIONS.items():
        inputs = [batch(name, model, rows=4, length=16)]
        if by == "probe":
            inputs = [one | {"classes": torch.arange(4) % 2} for one in inputs]
        try:
            first = score_layers(model, by, batches=inputs, **targets, **options)
        except ScoreError as error:
            assert name in REFUSED and any(text in str(error) for text in REFUSED[name]), error
        else:
            assert 0 < len(first.values) <= count and all(map(math.isfinite, first.values)), by
            assert by == "probe" or any(first.values), by  # nothing may be told of a few rows
            assert by not in ("influence", "removal") or all(v >= 0 for v in first.values)
            assert score_layers(model, by, batches=inputs, **targets, **options) == first
        assert same(looks(model), before), by


# ---- what is told by the state after a part, or by what it adds to what was told before it ---------------------------


def states_of(model: nn.Module, one: dict[str, Any]) -> list[torch.Tensor]:
    """Of a small GPT: the stream before, between and after the parts of its blocks, in order."""
    x = model.transformer.wte(one["input_ids"]) + model.transformer.wpe(torch.arange(one["input_ids"].shape[1]))
    found = [x]
    for block in model.transformer.h.children():
        x = x + block.attn(block.ln_1(x))
        found.append(x)
        x = x + block.mlp(block.ln_2(x))
        found.append(x)
    return found


def test_scores_of_states_are_those_of_the_stream_after_each_part():
    model = NanoGPT().eval()
    inputs = [batch("nanogpt", model, rows=6, seed=seed) for seed in range(2)]
    with torch.no_grad():
        seen = [torch.cat(side) for side in zip(*(states_of(model, one) for one in inputs), strict=True)]
        logits = [model.lm_head(model.transformer.ln_f(side)) for side in seen]
    classes = torch.arange(12) % 2
    rows = [one | {"classes": classes[6 * i : 6 * i + 6]} for i, one in enumerate(inputs)]
    agreed = [float((a.argmax(-1) == logits[-1].argmax(-1))[:, :-1].double().mean()) for a in logits]
    told = [probe.held_out(side[:, -1], classes, 3) for side in seen]

    def gains(values: list[float]) -> list[float]:
        return [b - a for a, b in zip(values, values[1:], strict=False)]

    wanted: dict[str, tuple[dict[str, Any], list[float]]] = {
        "representation": ({}, [sum(map(representation.prompt_entropy, side)) / 12 for side in seen[1:]]),
        "intrinsic_dimension": ({}, [intrinsic_dimension.dimension(side.flatten(0, 1)) for side in seen[1:]]),
        "language": ({}, [language.alikeness(s.mean(1)[::2], s.mean(1)[1::2], "retrieval") for s in seen[1:]]),
        "probe": ({"form": "gain", "folds": 3}, gains(told)),
        "lens": ({"form": "gain"}, gains(agreed)),
    }
    for by, (options, want) in wanted.items():
        given = {"batches": rows if by == "probe" else inputs, **options}
        found = score_layers(model, by, **given, **PARTS)
        assert found.values == pytest.approx(want, rel=1e-4, abs=1e-9) and found.unit == "sublayer", by
        whole = score_layers(model, by, **given, **PARTS | {"unit": "layer"}).values
        if options.get("form") == "gain":  # what parts add makes up what the layer adds
            assert [a + b for a, b in zip(found.values[::2], found.values[1::2], strict=True)] == pytest.approx(whole)
        else:  # the stream after the last part is what the layer gives out
            assert found.values[1::2] == pytest.approx(whole)
    alone = score_layers(model, "lens", batches=inputs, **PARTS | {"target_modules": ["c_fc"]})
    assert alone.values == pytest.approx(gains(agreed)[1::2])  # attention holds no target, and is a part all the same
    both = score_layers(model, "entropy", batches=inputs, clusters=5, **PARTS)
    assert (
        both.values[1::2]
        == score_layers(model, "entropy", batches=inputs, clusters=5, target_modules="all-linear").values
    )


@pytest.mark.parametrize("name", ["gpt_neox", "opt"])
def test_the_lens_reads_parts_that_stand_beside_each_other_or_are_several_modules(name):
    model = MODELS[name]().eval()
    one = batch(name, model, rows=3, length=9)
    values = score_layers(model, "lens", batches=[one], measure="kl", **PARTS).values
    whole = score_layers(model, "lens", batches=[one], measure="kl", **PARTS | {"unit": "layer"}).values
    summed = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    assert (summed == pytest.approx(whole, rel=1e-4)) is (name == "opt") and all(values)


@pytest.mark.parametrize("unit", ["sublayer", "target"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_scores_of_adapters_below_the_layer(name, unit):
    """IR-Tuning's are sums over the tensors of a unit; what one rollout damps are the adapters of the units it names."""
    model = MODELS[name]()
    one = batch(name, model)
    names = {"llama": ["q_proj", "up_proj"], "opt": ["q_proj", "fc1", "fc2"]}[name]
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    select = {"by": "adapter_gradient", "form": "norm", "keep": 1, "reselect_steps": 1, "unit": unit}
    wrapped = get_peft_model(model, LayerLoraConfig(select=select, r=2, target_modules=names, init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 1e-3)
    wrapped.eval()(**one).loss.backward()
    squares = {n: float(p.grad.double().square().sum()) for n, p in wrapped.named_parameters() if p.grad is not None}
    units, _ = in_units(layer_map(model), unit, match_targets(layer_map(model), names))
    wrapped.train()
    optimizer.zero_grad()
    wrapped(**one).loss.backward()
    optimizer.step()
    known = wrapped.peft_config["default"]._layerpeft.schedule.standing.known
    for u in units.layers:
        own = [s for n, s in squares.items() if lying_in([u.name])(clean(n.removeprefix("base_model.model.")))]
        assert len(own) >= 2 and known[u.index] == pytest.approx(sum(own) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_rollouts_damp_the_adapters_of_parts(name):
    model = MODELS[name]()
    one = batch(name, model)
    names = {"llama": ["q_proj", "up_proj"], "opt": ["q_proj", "fc1", "fc2"]}[name]
    wrapped = get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    layers = layer_map(wrapped)
    units, held = in_units(layers, "sublayer", match_targets(layers, names))
    select = Select.parse({"by": "importance", "keep": 1, "reselect_steps": 1, "unit": "sublayer", "rollouts": 2})
    measurement: Any = scoring.start(wrapped, select, units, held, live=True)
    measurement.attach()
    wrapped(**one).loss.backward()
    measurement.next_batch()
    measurement.detach()
    want = []
    for damped in measurement.damped:
        inside = lying_in([units.names[i] for i in damped])
        twin = copy.deepcopy(wrapped)
        for n, p in twin.named_parameters():
            if ".lora_B." in n and inside(clean(n.removeprefix("base_model.model."))):
                p.data.mul_(measurement.options.suppression)
        want.append(float(twin(**one).loss.detach()))
    assert measurement._run() == pytest.approx(want, rel=1e-5) and len(set(want)) == 2


@pytest.mark.parametrize(
    "select",
    [{"by": "lens", "measure": "kl"}, {"by": "representation", "measure": "invariance"}, {"by": "intrinsic_dimension"}],
    ids=lambda select: select["by"],
)
def test_parts_are_scored_on_the_first_step_as_they_are_beforehand(select):
    model = llama()
    one = batch("llama", model, rows=4, length=12)
    asked = {**select, "unit": "sublayer"}
    want = score_layers(llama(), batches=[one], num_batches=1, target_modules="all-linear", progress=False, **asked)
    wrapped = get_peft_model(model, LayerLoraConfig(select={**asked, "keep": 2}, r=2, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 1e-3)
    wrapped.train()(**one).loss.backward()
    optimizer.step()
    selection: Any = wrapped.peft_config["default"]._layerpeft.selection
    assert selection.scores.values == pytest.approx(want.values, rel=1e-4, abs=1e-7) and selection.unit == "sublayer"
    assert selection.layers == tuple(sorted(want.ranked()[:2]))
