"""Hidden states of a tiny model, had another way than scorers have them; and what a model looks like before it is scored."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy
import torch
from torch import nn

from layerpeft import score_layers
from layerpeft.model.layers import find_module, layer_map
from layerpeft.selection.scoring import Request
from tests.helpers.models import MODELS, batch


def padded(name: str, model: nn.Module, rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, Any]:
    """A batch whose rows are of several lengths, padded on the right; labels ignore the padding."""
    made = batch(name, model, rows=rows, length=length, seed=seed)
    lengths = torch.tensor([length - (2 * i + seed) % 5 for i in range(rows)])
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    if "attention_mask" in made or name not in ("t5", "bart", "whisper"):
        made["attention_mask"] = mask
    if "labels" in made and made["labels"].shape == mask.shape:
        made["labels"] = made["labels"].masked_fill(mask == 0, -100)
    return made


def request_of(model: nn.Module, **more: Any) -> Request:
    layers = layer_map(model)
    return Request(model, layers, layers.targets, **more)


def passages(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What enters and leaves every layer of a Llama-like model, in float64."""
    found: list[Any] = []
    blocks = [find_module(model, name) for name in layer_map(model).names]
    handles = [b.register_forward_hook(lambda _m, args, y: found.append((args[0].clone(), y.clone()))) for b in blocks]
    with torch.no_grad():
        copy.copy(model).eval()(**inputs)
    for handle in handles:
        handle.remove()
    return [(a.double(), b.double()) for a, b in found]


def llama(**options: Any) -> nn.Module:
    return MODELS["llama"](**options).eval()


def looks(model: nn.Module) -> Any:
    """Everything that scoring has to leave as it was."""
    modules = list(model.modules())
    return (
        {n: t.clone() for n, t in model.state_dict().items()},
        [m.training for m in modules],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        [sorted(vars(m)) for m in modules],
        getattr(getattr(model, "config", None), "use_cache", None),
        (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def scored(model: nn.Module, by: str, batches: list[dict[str, Any]], **options: Any) -> tuple[float, ...]:
    return score_layers(model, by, batches=batches, target_modules="all-linear", progress=False, **options).values


def texts(model: nn.Module, batches: list[dict[str, Any]]) -> list[list[tuple[numpy.ndarray, numpy.ndarray]]]:
    """By layer, what enters and leaves it, text by text without padding."""
    found: list[list[Any]] = [[] for _ in layer_map(model).layers]
    for one in batches:
        for layer, (before, after) in enumerate(passages(model, one)):
            for x, y, real in zip(before, after, one["attention_mask"] != 0, strict=True):
                found[layer].append((x[real].numpy(), y[real].numpy()))
    return found
