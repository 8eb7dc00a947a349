"""vLLM: an adapter beside its base, or a whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from layerpeft.errors import unknown
from layerpeft.integrations.empty import empty_model
from layerpeft.model.layers import base_of
from layerpeft.saving.manifest import CONFIG, WEIGHTS
from layerpeft.saving.shards import Entry, write_one_by_one
from layerpeft.text import some
from layerpeft.tuners.merge import files_beside
from layerpeft.using.export.adapter import PREFIX, Adapter, Factor, faults, key
from layerpeft.using.export.limits import VLLM, VLLM_KINDS
from layerpeft.using.export.subject import TEMPLATE, Command, Subject

CLASSES = "ForSequenceClassification"


def problems(subject: Subject) -> list[str]:
    """What vLLM does not take."""
    kind, adapter = subject.found.kind, subject.adapter
    if adapter is None:
        served = any(kind.endswith(name) for name in VLLM_KINDS)
        allowed = f"allowed: {', '.join(VLLM_KINDS)}"
        return [] if served else [f"{kind}: vLLM has no task for such models; {allowed}"]
    found = []
    whole = subject.architecture.replace(CLASSES, "ForCausalLM")
    if not kind.endswith(("CausalLM", "SequenceClassification")):
        found.append(
            f"{kind}: vLLM takes adapters of models that write text or have classes (CausalLM, SequenceClassification)"
        )
    elif kind.endswith("SequenceClassification") and not subject.architecture.endswith(CLASSES):
        found.append(
            f"the base is a {subject.architecture}, which has no head for classes, and vLLM puts an adapter on the "
            f"base as it lies there; allowed: a base whose config.json names …{CLASSES}"
        )
    if whole not in VLLM.architectures:
        found.append(unknown("architecture", subject.architecture, VLLM.architectures))
    found += faults(adapter, VLLM)
    if subject.tied and any(name.endswith("lm_head") for name in adapter.factors):
        found.append("lm_head: the base has its head and its embeddings in one tensor, on which vLLM takes no adapter")
    if not found:
        there = dict(_empty(subject).named_modules())
        if lost := [name for name in adapter.factors if name not in there]:
            found.append(f"{some(lost)}: the base has no such linears; name the one it was trained on: --base MODEL")
    return found


def _empty(subject: Subject) -> nn.Module:
    return base_of(empty_model(getattr(transformers, subject.found.kind), subject.config))


def added(adapter: Adapter, model: nn.Module) -> dict[str, Factor]:
    """Linears that vLLM keeps as one with those that were trained, and that have no adapter: they get one of zeros."""
    found: dict[str, Factor] = {}
    modules = dict(model.named_modules())
    for name, factor in adapter.factors.items():
        above, dot, leaf = name.rpartition(".")
        for group in (g for g in VLLM.joined if leaf in g):
            for sibling in (f"{above}{dot}{other}" for other in group):
                weight: Any = getattr(modules.get(sibling), "weight", None)
                if sibling in adapter.factors or weight is None or weight.dim() != 2:
                    continue
                rank = max(factor.rank, found[sibling].rank if sibling in found else 0)
                found[sibling] = Factor(rank, factor.scale, weight.shape[1], weight.shape[0])
    return found


def lacks(subject: Subject) -> str | None:
    """Nothing besides this package."""
    return None


def write(subject: Subject, into: Path) -> str:
    """Writes an adapter whose modules all have one scale, in all that vLLM joins. Returns what it is, in words."""
    adapter = subject.adapter
    assert adapter is not None
    zeros = added(adapter, _empty(subject))
    scale, times = adapter.evened(lambda factor: factor.scale)
    entries, file = {}, WEIGHTS[0]
    kind = adapter.weights.dtype or torch.float32
    for name, factor in sorted({**adapter.factors, **zeros}.items()):
        for side, shape in (("A", (factor.rank, factor.into)), ("B", (factor.out, factor.rank))):
            own = adapter.weights.entries[key(name, side)].dtype if name in adapter.factors else kind
            multiplied = side == "B" and times.get(name, 1.0) != 1.0
            entries[key(name, side)] = Entry(file, shape, torch.float32 if multiplied else own)
    entries |= {name: adapter.weights.entries[name] for name in adapter.saved}

    def pieces(tensor: str) -> Iterator[torch.Tensor]:
        name, _, side = tensor.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if name in adapter.factors:
            yield adapter.read(name, side, times[name] if side == "B" else 1.0)
        elif name in zeros:
            yield torch.zeros(entries[tensor].shape, dtype=kind)
        else:
            yield adapter.weights.read(tensor)

    write_one_by_one(into / file, entries, pieces)
    said = json.dumps(_config(subject, {**adapter.factors, **zeros}, scale), indent=2, sort_keys=True)
    (into / CONFIG).write_text(f"{said}\n", encoding="utf-8")
    for path in files_beside(adapter.folder, None):
        shutil.copyfile(path, into / path.name)
    more = f", and zeros for {len(zeros)} that vLLM joins with them" if zeros else ""
    return f"an adapter for vLLM: {len(adapter.factors)} linears, rank {adapter.rank}{more}"


def _config(subject: Subject, factors: Mapping[str, Factor], scale: float) -> dict[str, Any]:
    """adapter_config.json: whatever reads one number for all modules, or one for each, multiplies each by `scale`."""
    adapter = subject.adapter
    assert adapter is not None
    rank = adapter.rank
    others = {name: factor.rank for name, factor in sorted(factors.items()) if factor.rank != rank}
    excluded = adapter.said.get("exclude_modules")
    kept = [n for n in excluded if n not in factors] if isinstance(excluded, list) else None
    return {
        **adapter.said,
        "base_model_name_or_path": subject.found.base,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": {name: _number(scale * own) for name, own in others.items()},
        "target_modules": sorted(factors),
        "exclude_modules": kept or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "inference_mode": True,
    }


def _number(value: float) -> float | int:
    """A whole number as one, which PEFT's files have for alpha."""
    return int(value) if value == int(value) else value


def commands(subject: Subject, folder: Path, name: str) -> list[Command]:
    """What serves it."""
    more = next((words for end, words in VLLM_KINDS.items() if subject.found.kind.endswith(end)), ())
    if subject.adapter is None:
        return [Command(("vllm", "serve", str(folder), *more), "an OpenAI-compatible server on port 8000")]
    adapter = subject.adapter
    rank = next(r for r in VLLM.ranks if r >= adapter.rank)
    place = str(folder)
    # `name=path` is split at every "=", and takes no comma
    plain = not set("=,") & set(place)
    module = f"{name}={place}" if plain else json.dumps({"name": name, "path": place})
    words = ["vllm", "serve", str(subject.found.base), *more, "--enable-lora", "--max-lora-rank", str(rank)]
    if revision := adapter.said.get("revision"):
        words += ["--revision", str(revision)]
    if subject.template is not None:
        words += ["--chat-template", str(folder / TEMPLATE)]
    words += ["--lora-modules", module]
    return [Command(tuple(words), f"an OpenAI-compatible server on port 8000, which has it as the model {name!r}")]
