"""A checkpoint of 16 layers (2 GB in float32), and how much anonymous memory a command takes over it, in a process of its own.

Pages of the checkpoint's files are the system's, which takes them back when it needs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copy, rmtree

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from layerpeft.integrations.empty import empty_model
from layerpeft.saving.shards import Entry, write_one_by_one
from tests.conftest import LLAMA
from tests.helpers.short import short_llama

LAYERS, WIDTH, INNER = 16, 1536, 5120
SIZES = [(WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]  # (out, in) of its matrices
LAYER = 4 * WIDTH**2 + 3 * WIDTH * INNER  # numbers
# Whatever is freed goes back to the system at once (docs/prefix.md): glibc keeps it, in holes too small for the next of its size.
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536"}

# What is there before the command: what it imports (told by running it on a small model) and what the libraries that multiply
# keep to themselves once they have met matrices and rows of these sizes (oneDNN compiles a product for each, and keeps the
# largest matrix in its own order; MKL keeps its panels).
RUN = """
import contextlib, gc, json, sys, threading, time
import torch
from layerpeft.cli import main
from layerpeft.integrations.torch import give_back

verbs, small, words, sizes, dtype, shape = json.loads(sys.argv[1])

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def settled():
    gc.collect()
    give_back()
    return held()

def watch():
    while True:
        seen.append(held())
        time.sleep(0.002)

with contextlib.redirect_stdout(sys.stderr):
    for verb in verbs:
        assert main([verb, "quickstart", *small]) == 0
    imports = settled()
    for out, into in sizes:
        x = torch.randn(*shape, into, dtype=getattr(torch, dtype), requires_grad=True)
        torch.nn.functional.linear(x, torch.randn(out, into, dtype=x.dtype)).sum().backward()
    del x
    start = settled()
    seen = [start]
    threading.Thread(target=watch, daemon=True).start()
    code = main([verbs[-1], "quickstart", *words])
    peak = max(seen)
print(json.dumps({"peak": peak - start, "products": start - imports, "imports": imports}))
sys.exit(code)
"""


@dataclass(frozen=True)
class Held:
    """Bytes: `peak` of a command above what was there before it, which is what `imports` and libraries of `products` hold."""

    peak: int
    products: int
    imports: int


@contextmanager
def checkpoint(folder: Path, dtype: torch.dtype) -> Iterator[Path]:
    """Of random weights, written tensor by tensor; it goes afterwards."""
    try:
        yield _written(folder, dtype)
    finally:
        rmtree(folder)


def _written(folder: Path, dtype: torch.dtype) -> Path:
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


def held_by(
    verb: str, words: Sequence[str], place: Path, dtype: str, shape: tuple[int, int], env: dict[str, str] | None = None
) -> Held:
    """Of a command on the checkpoint, in batches of `shape` (rows, tokens), with `env` as a user would set it; `place`: a folder of
    its own."""
    apart = ("model_name_or_path=", "output_dir=", "layerpeft.prefix_cache=")
    small = [word for word in words if not word.startswith(apart)]
    small += [f"model_name_or_path={short_llama()}", f"output_dir={place}/small-{verb}"]
    small += [f"layerpeft.prefix_cache={place}/small-states-{verb}"]
    verbs = ["prefill", "train"] if verb == "train" else [verb]
    given = json.dumps([verbs, small, list(words), SIZES, dtype, shape])
    around = {k: v for k, v in os.environ.items() if k != "HF_DEACTIVATE_ASYNC_LOAD"} | (env or {})
    command = [sys.executable, "-c", RUN, given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=around)
    assert done.returncode == 0, done.stderr[-3000:]
    found = Held(**json.loads(done.stdout.splitlines()[-1]))
    print(verb, found)
    return found
