"""llama.cpp: an adapter's file, or the command that makes one of a whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from layerpeft.errors import unknown
from layerpeft.integrations import gguf
from layerpeft.text import some
from layerpeft.using.export.adapter import faults
from layerpeft.using.export.limits import LAYOUTS, LLAMA_CPP
from layerpeft.using.export.subject import TEMPLATE, Command, Subject

FILE = "adapter.gguf"
SCRIPT = "convert_hf_to_gguf.py"  # in a checkout of llama.cpp


def problems(subject: Subject) -> list[str]:
    """What llama.cpp does not take."""
    found = []
    if not subject.found.kind.endswith("CausalLM"):
        found.append(f"{subject.found.kind}: allowed: models that write text (CausalLM)")
    if getattr(subject.config, "quantization_config", None):
        found.append("the base is quantized, and llama.cpp converts unquantized ones; name it in 16 bit: --base MODEL")
    adapter = subject.adapter
    if adapter is None:
        return found
    layout = LAYOUTS.get(subject.architecture)
    if layout is None:
        found.append(unknown("architecture", subject.architecture, LAYOUTS))
    found += faults(adapter, LLAMA_CPP)
    if layout is not None and not lacks(subject):
        called = gguf.names_of(layout.name, subject.config.num_hidden_layers)
        if lost := [name for name in adapter.factors if called(name) is None]:
            found.append(f"{some(lost)}: llama.cpp has no such linears in a model of the kind {layout.name}")
    if subject.tied and any(name.endswith("lm_head") for name in adapter.factors):
        found.append(
            "lm_head: the base has its head and its embeddings in one tensor, on which llama.cpp takes no adapter"
        )
    return found


def lacks(subject: Subject) -> str | None:
    """The command that installs what writing takes; None where nothing is missing."""
    return gguf.missing() if subject.adapter is not None else None


def order(rows: int, heads: int) -> torch.Tensor:
    """Where each of llama.cpp's rows of q or k lies in transformers': numbers that are rotated together lie beside each other
    there, and half a head apart here."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def write(subject: Subject, into: Path, name: str) -> str:
    """Writes the adapter's file. Returns what it is, in words."""
    adapter, config = subject.adapter, subject.config
    assert adapter is not None
    layout = LAYOUTS[subject.architecture]
    called = gguf.names_of(layout.name, config.num_hidden_layers)
    alpha, times = adapter.evened(lambda factor: factor.scale * factor.rank)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    where: dict[str, tuple[str, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, factor in adapter.factors.items():
        for side, shape in (("A", (factor.rank, factor.into)), ("B", (factor.out, factor.rank))):
            tensor = f"{called(module)}.weight.lora_{side.lower()}"
            where[tensor], shapes[tensor] = (module, side), shape

    def read(tensor: str) -> torch.Tensor:
        module, side = where[tensor]
        if side == "A":
            return adapter.read(module, side)
        found = adapter.read(module, side, times[module])
        own = heads.get(module.rpartition(".")[2]) if layout.turned else None
        return found[order(len(found), own)] if own else found

    gguf.write_adapter(into / FILE, layout.name, alpha, name, shapes, read)
    if subject.template is not None:
        shutil.copyfile(subject.template, into / TEMPLATE)
    return f"an adapter for llama.cpp: {len(adapter.factors)} linears of the kind {layout.name}, rank {adapter.rank}"


def commands(subject: Subject, folder: Path, name: str) -> list[Command]:
    """What makes a file of the model, and what serves it."""
    whole = subject.adapter is None
    file = str(folder / ("model.gguf" if whole else "base.gguf"))
    place = str(folder) if whole else str(subject.found.base)
    words = ["python", SCRIPT, place, "--outfile", file]
    if not Path(place).is_dir():
        words.append("--remote")  # a name on the hub
    serve = ["llama-server", "-m", file]
    serve += [] if whole else ["--lora", str(folder / FILE)]
    serve += ["--jinja", "--chat-template-file", str(folder / TEMPLATE)] if subject.template else []
    what = "the model" if whole else "the base"
    return [
        Command(tuple(words), f"a file of {what}; the script lies in a checkout of llama.cpp"),
        Command(tuple(serve), "an OpenAI-compatible server, at the address that it prints"),
    ]
