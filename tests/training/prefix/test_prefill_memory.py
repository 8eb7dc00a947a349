"""A checkpoint of 2 GB is filled ahead in a process of its own: it never holds more than one layer, and little besides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import copy

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from layerpeft.integrations.empty import empty_model
from layerpeft.saving.shards import Entry, write_one_by_one
from tests.conftest import LLAMA

LAYERS, WIDTH, INNER = 16, 1536, 5120
LAYER = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER)  # bytes

RUN = """
import sys, threading, time
from trl import SFTTrainer
from layerpeft.cli import main
import layerpeft.recipe.commands

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while True:
        seen.append(held())
        time.sleep(0.002)

seen = [held()]
threading.Thread(target=watch, daemon=True).start()
code = main(sys.argv[1:])
print(f"peak {max(seen) - seen[0]}")
sys.exit(code)
"""


def checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """Of random weights, written tensor by tensor in float32."""
    folder.mkdir()
    vocab = AutoConfig.from_pretrained(LLAMA).vocab_size
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 12}
    config = LlamaConfig(**sizes, vocab_size=vocab, max_position_embeddings=512, dtype=dtype)
    model = empty_model(LlamaForCausalLM, config, dtype)
    entries = {n: Entry("model.safetensors", tuple(p.shape), dtype) for n, p in model.named_parameters()}
    write_one_by_one(folder / "model.safetensors", entries, lambda n: [torch.randn(entries[n].shape) * 0.02])
    config.save_pretrained(folder)
    for file in LLAMA.glob("*token*"):
        copy(file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_checkpoint_of_2_gb_is_filled_with_one_layer_in_memory(tmp_path: Path):
    base = checkpoint(tmp_path / "base", torch.float32)
    assert (base / "model.safetensors").stat().st_size > 2e9
    settings = [
        f"model_name_or_path={base}",
        f"output_dir={tmp_path}/out",
        "dtype=float32",
        "bf16=false",
        "use_cpu=true",
    ]
    settings += [
        "layerpeft.select=last:4",
        f"layerpeft.prefix_cache={tmp_path}/states",
        "per_device_train_batch_size=2",
    ]
    settings += ["max_train_samples=6", "max_eval_samples=2", "max_length=64", 'columns={text: "{answer}"}']
    command = [sys.executable, "-c", RUN, "prefill", "quickstart", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("peak")))
    print(json.dumps({"layer": LAYER, "peak": peak}))
    assert peak < LAYER + 200e6
