"""Scorers that read weights hold one matrix at a time, over a checkpoint of 2 GB, which loading maps and does not copy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from layerpeft import score_layers
from layerpeft.integrations.peft import dequantized
from layerpeft.model import precisions, weights
from layerpeft.selection import plugins
from layerpeft.selection.select import SCORERS
from tests.helpers.loops import llama

LAYERS, WIDTH, INNER = 20, 2048, 5504
MORE = 200  # MB, besides one matrix in float32
# what a process holds by itself; pages of the checkpoint's files are the system's, which takes them back when it needs them
CHILD = """
import ctypes, json, sys, threading, time
from transformers import AutoModelForCausalLM
from layerpeft import layer_map, score_layers
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024
imports, peak, found = held(), [0.0], {}
def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for by, options in json.loads(sys.argv[2]):
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of those before is nothing that this one holds
    peak[0] = 0.0
    values = score_layers(model, by, **{"target_modules": "all-linear", **options}).values
    found[f"{by} {options}"] = peak[0] - imports, len(values)
print(json.dumps(found))
"""
# every scorer that reads weights; whole decompositions, and the slowest roundings, are of a few matrices
FEW = {"target_modules": ["layers.3.mlp.up_proj", "layers.3.mlp.down_proj", "layers.9.mlp.down_proj"]}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("weight_norm", {}),
    ("outliers", {"activations": False, "M": 3.0}),
    ("quantization_error", {"precision": "nf4", "target_modules": ["down_proj"]}),
    ("quantization_error", {"precision": "int8", "relative": True, **FEW}),
    ("quantization_error", {"precision": "nf4", "double_quant": True, **FEW}),
    ("quantization_error", {"precision": "hqq2", **FEW}),
    ("heavy_tail", {"form": "averaged", "window": 8, "places": 2}),
    ("heavy_tail", FEW),
    ("snr", FEW),
]


def test_every_scorer_that_reads_weights_is_asked_here():
    found = {by for by, _ in ASKED}
    for by in plugins.names(SCORERS):
        scorer = plugins.get(SCORERS, by)
        fields = {f.name for f in dataclasses.fields(scorer.Options)}
        options = scorer.Options(**({"activations": False} if "activations" in fields else {}))
        if scorer.needs(options) == "weights" and by != "change":  # which reads a run's adapter, tensor by tensor
            assert by in found, by


@pytest.mark.parametrize(
    ("by", "options", "copies"),
    [
        ("weight_norm", {}, 0.2),
        ("outliers", {"activations": False, "M": 2.0}, 0.2),
        ("quantization_error", {"precision": "nf4"}, 0.8),
        ("quantization_error", {"precision": "int8"}, 0.8),
        ("heavy_tail", {"form": "averaged", "window": 8, "places": 2}, 0.2),
        ("heavy_tail", {}, 2.2),
        ("snr", {}, 2.2),
    ],
)
def test_they_hold_pieces_of_one_matrix_or_as_many_copies_of_it_as_a_decomposition_takes(
    monkeypatch, by, options, copies
):
    """What is allocated while a 16-bit model is scored, in float32 copies of one of its matrices."""
    monkeypatch.setattr(weights, "PIECE", 1 << 11)
    model = llama(hidden_size=64, intermediate_size=1024, num_hidden_layers=2).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        score_layers(model, by, target_modules=["up_proj"], progress=False, **options)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    assert 0 < max(held) < copies * 4 * 64 * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_matrix_at_a_time(tmp_path):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=True, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    drawn = {s: torch.randn(s, generator=torch.Generator().manual_seed(len(s))).bfloat16() for s in {*shapes.values()}}
    where, total = {}, 0
    for i in range(-1, LAYERS):
        names = [n for n in shapes if (f".layers.{i}." in n if i >= 0 else ".layers." not in n)]
        file = f"model-{i + 2:05d}-of-{LAYERS + 1:05d}.safetensors"
        save_file({n: drawn[shapes[n]].clone() for n in names}, tmp_path / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
        total += sum(2 * shapes[n].numel() for n in names)
    assert total > 2e9
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    ran = [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(ASKED)]
    found = json.loads(subprocess.run(ran, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
    for by, (more, layers) in found.items():
        assert layers == LAYERS and more < 4 * WIDTH * INNER / 2**20 + MORE, (by, more)


def test_rounding_in_slabs_is_rounding_of_the_whole():
    storage, plain = precisions.Storage(double_quant=True), torch.nn.Linear(320, 1728, bias=False)  # two slabs
    weight = plain.weight.detach().clone()
    whole = dequantized(precisions.quantized_linear(plain, "nf4", storage))
    assert torch.equal(precisions.rounded(weight, "nf4", storage), whole)
    assert not torch.equal(whole, precisions.rounded(weight, "nf4", precisions.Storage()))
