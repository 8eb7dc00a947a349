"""The shipped Llama with its first five layers of twelve: what a test costs that trains real text goes with the depth."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.conftest import DATA, LLAMA

LAYERS = 5
ROWS = 160


@cache
def short_llama(layers: int = LAYERS) -> Path:
    """Its folder, with the tokenizer; it goes with the process."""
    held = tempfile.mkdtemp(prefix="short-llama-")
    atexit.register(shutil.rmtree, held, ignore_errors=True)
    return shorten(Path(held) / "llama", layers)


@cache
def short_home() -> Path:
    """What ships inside the package, with the short Llama in the place of the whole one, and the first rows of all."""
    home = short_llama().parent / "home"
    (home / "data").mkdir(parents=True)
    for path in DATA.glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]
        (home / "data" / path.name).write_text("".join(rows), encoding="utf-8")
    (home / "data" / LLAMA.name).symlink_to(short_llama())
    (home / "recipes").symlink_to(DATA.parent / "recipes")
    return home


def shorten(folder: Path, layers: int = LAYERS) -> Path:
    """Writes it to a folder that is not there."""
    shutil.copytree(LLAMA, folder)
    config = json.loads((LLAMA / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    tensors = load_file(LLAMA / "model.safetensors")
    below = {n: t for n, t in tensors.items() if ".layers." not in n or int(n.split(".")[2]) < layers}
    save_file(below, folder / "model.safetensors", {"format": "pt"})
    return folder
