"""Memory while a checkpoint is loaded quantized: as it is read, after it was loaded, and by transformers with bitsandbytes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import resident, table
from benchmarks.case import Case
from layerpeft.errors import ConfigError, Problems, unknown
from layerpeft.model.layers import layer_map
from layerpeft.model.precisions import PRECISIONS, Storage, measured_bytes
from layerpeft.quantization.apply import apply
from layerpeft.quantization.load import load_quantized
from layerpeft.text import size_text

Say = Callable[[str], None]
PEERS = ("nf4", "fp4", "int8")  # what transformers quantizes by itself


@dataclass(frozen=True)
class Options:
    """A random Llama in bfloat16 in files of `shard`; all linears of its layers go to one precision, each way in its own process.

    `as_types`: the types that it is loaded in; bfloat16 is the file's own, of which nothing has to be copied.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    vocab_size: int
    precisions: Sequence[str] = ("nf4",)
    ways: Sequence[str] = ("load_quantized", "in_place", "transformers")
    as_types: Sequence[str] = ("bfloat16", "float16")
    shard: str = "500MB"
    threads: int = 1
    seed: int = 0


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    for name in options.precisions:
        if name not in PRECISIONS:
            problems.add(f"precisions: {unknown('precision', name, PRECISIONS)}")
    for name in options.ways:
        if name not in WAYS:
            problems.add(f"ways: {unknown('way', name, WAYS)}")
    if not resident.here():
        problems.add("the system does not tell how much anonymous memory a process has")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Rows of bytes by way, precision and type."""
    options: Options = case.options
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        size, layer = write(options, folder)
        say(f"a checkpoint of {size_text(size)} is written")
        rows = []
        for kind in options.as_types:
            for precision in options.precisions:
                for way in options.ways:
                    if way != "transformers" or precision in PEERS:
                        rows.append(alone(way, folder, precision, kind, options.threads))
                        say(f"{way}, {precision}, {kind}: {size_text(rows[-1]['peak'])}")
    return {"checkpoint_bytes": size, "layer_bytes": layer, "rows": rows}


def alone(way: str, folder: Path, precision: str, kind: str, threads: int) -> dict[str, Any]:
    """One way in a process of its own. Raises: ConfigError with what that process said when it fails."""
    words = [sys.executable, "-m", "benchmarks.kinds.loading", way, str(folder), precision, kind, str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    if done.returncode:
        raise ConfigError(f"{way} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"way": way, "precision": precision, "type": kind, **found}


def write(options: Options, folder: Path) -> tuple[int, int]:
    """Writes the checkpoint; its bytes and those of a layer."""
    torch.manual_seed(options.seed)
    heads = max(1, options.hidden_size // 128)
    config = transformers.LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        vocab_size=options.vocab_size,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        dtype=torch.bfloat16,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=options.shard)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")), layer


def _load(folder: str, names: Sequence[str], precision: str, dtype: torch.dtype) -> nn.Module:
    return load_quantized(folder, dict.fromkeys(names, precision), Storage(), dtype=dtype, progress=False)


def _in_place(folder: str, names: Sequence[str], precision: str, dtype: torch.dtype) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    apply(model, dict.fromkeys(names, precision), Storage(), progress=False)
    return model


def _transformers(folder: str, names: Sequence[str], precision: str, dtype: torch.dtype) -> nn.Module:
    how: dict[str, Any] = {"load_in_8bit": True}
    if precision != "int8":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": precision, "bnb_4bit_compute_dtype": dtype}
    settings = transformers.BitsAndBytesConfig(**how)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=settings, device_map="cpu"
    )


WAYS: Mapping[str, Callable[..., nn.Module]] = {
    "load_quantized": _load,
    "in_place": _in_place,
    "transformers": _transformers,
}


def main(way: str, folder: str, precision: str, kind: str, threads: str) -> None:
    """What the process of `alone` does: it prints its row."""
    torch.set_num_threads(int(threads))
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, kind)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    names = [t.name for t in layer_map(empty).targets]
    with tempfile.TemporaryDirectory() as place:  # libraries are loaded, and their tables made, by a small one
        tiny = Path(place)
        write(Options(128, 128, layers=1, vocab_size=16), tiny)
        WAYS[way](str(tiny), [n for n in names if ".layers.0." in n], precision, dtype)
    model, memory = resident.watched(lambda: WAYS[way](folder, names, precision, dtype))
    packed = sum(measured_bytes(model.get_submodule(n)) for n in names)
    kept = sum(p.nbytes for n, p in model.named_parameters() if n.rpartition(".")[0] not in names)
    print(json.dumps({**asdict(memory), "packed": packed, "kept": kept}))


def tables(result: Mapping[str, Any]) -> str:
    """One line per way."""
    layer = result["layer_bytes"]
    lines = [
        [
            f"`{row['way']}`",
            row["precision"],
            row["type"],
            size_text(row["packed"]),
            size_text(row["peak"]),
            f"{(row['peak'] - row['after']) / layer:.2f}",
            size_text(row["after"]),
            size_text(row["resident"]),
            f"{row['seconds']:.0f} s",
        ]
        for row in result["rows"]
    ]
    head = ["way", "precision", "loaded as", "quantized linears", "peak", "over what is left, in layers", "left"]
    return table.markdown([*head, "resident", "time"], lines) + (
        f"\n\nThe checkpoint has {size_text(result['checkpoint_bytes'])}, a layer {size_text(layer)} in 16 bit. Peak and left are "
        'anonymous memory over what the process had before; "resident" counts pages of the checkpoint\'s files as well, which the '
        "system takes back when others need memory. What is kept as it is in the file (bfloat16) stays there, and is no anonymous "
        "memory."
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""


if __name__ == "__main__":
    main(*sys.argv[1:])
