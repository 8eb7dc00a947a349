"""Scores of the parts of layers from forward passes: the stream as a hand-written pass has it, and parts that are left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from layerpeft import layer_map, score_layers
from layerpeft.errors import ScoreError
from layerpeft.model.units import in_units
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
REFUSED = {"zamba2": ("do not hand on one stream", "not known which matrix")}


@pytest.mark.parametrize(("name", "stack"), some(CASES, FEW))
def test_finite_deterministic_and_without_a_trace(name, stack):
    model = build(name).eval()
    targets = {**PARTS, **targets_of(name), "stack": stack}
    count = len(in_units(layer_map(model, stack), "sublayer", layer_map(model, stack).targets)[0])
    before = looks(model)
    for by in ("influence", "removal"):
        inputs = [batch(name, model, rows=4, length=16)]
        options = {"distance": "norm"} if by == "removal" else {}
        try:
            first = score_layers(model, by, batches=inputs, **targets, **options)
        except ScoreError as error:
            assert name in REFUSED and any(text in str(error) for text in REFUSED[name]), error
        else:
            assert 0 < len(first.values) <= count and all(v >= 0 for v in first.values) and any(first.values)
            assert score_layers(model, by, batches=inputs, **targets, **options) == first
        assert same(looks(model), before), by
