"""Projection on disk: a stock LoRA adapter for everybody, and beside it the state that a resumed run goes on from."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad

from layerpeft.errors import SaveError, differences
from layerpeft.integrations.engines.fsdp import give_up
from layerpeft.integrations.engines.known import cut_like, is_cut, local
from layerpeft.integrations.files import as_written, header_of, note_in, replacing
from layerpeft.integrations.peft import CUT, given_state, watch_states
from layerpeft.integrations.torch import in_states
from layerpeft.model.home import known_of
from layerpeft.model.layers import base_of
from layerpeft.model.names import clean
from layerpeft.saving import manifest
from layerpeft.training.record import record_of
from layerpeft.tuners.galore.folds import Factors, part, recompressed
from layerpeft.tuners.galore.projection import (
    columns,
    fixed_of,
    held,
    keeps_part,
    projections,
    restore,
    state_of,
    tensors,
    trained_of,
)

STATE = "layerpeft_state.safetensors"
KEYS = ("lora_A", "lora_B")


def write(
    folder: str | os.PathLike[str], model: nn.Module, adapter: str, identity: Mapping[str, Any], max_rank: int | None
) -> dict[str, Any]:
    """Writes the state that a run goes on from beside the weights, which hold what `whole` gave.

    `identity`: the options that such a run must share. Returns the rank of what was saved, and the largest relative error of what
    `max_rank` cut.
    """
    layers = dict(projections(model, adapter))
    ranks = [columns(m) for m in layers.values()]
    given = _factors(layers, given_state() or {})
    error = max((_cut(held(m, *given[n]), max_rank)[1] for n, m in layers.items() if max_rank), default=0.0)
    state = {f"{n}|{k}": t.contiguous() for n, m in layers.items() for k, t in tensors(m, *given[n]).items()}
    with replacing(Path(folder, STATE)) as file:
        save_file(state, file, {"projection": json.dumps(dict(identity))})
    return {"rank": min(max(ranks), max_rank or max(ranks)), "error": error}


def whole(
    model: nn.Module, adapter: str, found: Mapping[str, torch.Tensor], max_rank: int | None
) -> dict[str, torch.Tensor]:
    """All that was trained, as a stock adapter whose alpha is its rank: in the place of the running period, of which `found` tells.

    Every module has the same rank; where less is needed the rest is zeros. Raises: SaveError for the weights of another moment,
    of which the folds are not known.
    """
    layers: dict[str, Any] = {
        n: m for n, m in model.named_modules() if getattr(m, "_layerpeft", None) and hasattr(m, "lora_A")
    }
    layers = {n: m for n, m in layers.items() if state_of(m).adapter == adapter}
    _check_given(layers, adapter, found)
    given = _factors({state_of(m).name: m for m in layers.values()}, found)
    pairs = {n: _cut(held(m, *given[state_of(m).name]), max_rank)[0] for n, m in layers.items()}
    rank = max((left.shape[-1] for left, _ in pairs.values()), default=0)
    stock = {}
    for name, (left, right) in pairs.items():
        more = rank - left.shape[-1]
        factors = _as_stock(pad(left, (0, more)), pad(right, (0, 0, 0, more)))
        stock |= {f"{name}.{k}.{adapter}.weight": f.contiguous() for k, f in zip(KEYS, factors, strict=True)}
    return stock


def _check_given(layers: Mapping[str, Any], adapter: str, found: Mapping[str, torch.Tensor]) -> None:
    for name, layer in layers.items():
        for key, group in zip(KEYS, (layer.lora_A, layer.lora_B), strict=True):
            path, now = f"{name}.{key}.{adapter}.weight", group[adapter].weight.detach()
            given = found.get(path)
            if given is not None and given.shape == now.shape:  # of what is cut up, this process can tell its own part
                here = local(now)
                if torch.equal(local(cut_like(given.to(here.device), now)).to(here.device), here):
                    continue
            raise SaveError(
                f"the weights given are not those of now ({path}), and what was folded before them is not among them: save a "
                "projection as it stands, model.save_pretrained(folder)"
            )


def _factors(
    layers: Mapping[str, Any], given: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (trained, fixed) of every module: its own, and those of `given` where it has a part of its own only."""
    named = {clean(k.removeprefix("base_model.model.")): t for k, t in given.items() if ".lora_" in k}
    found = {}
    for name, layer in layers.items():
        state, pair = state_of(layer), (trained_of(layer).detach(), fixed_of(layer).detach())
        if keeps_part(layer):
            raise SaveError(f"{name}: the first process alone has all that was folded, so save there")
        if is_cut(pair[0]):
            order = reversed(KEYS) if state.side == "right" else KEYS
            pair = tuple(named[f"{name}.{key}.{state.adapter}.weight"] for key in order)
        found[name] = pair
    return found


def _cut(pair: Factors, max_rank: int | None) -> tuple[Factors, float]:
    pair = pair[0].float(), pair[1].float()
    return recompressed(pair, max_rank) if max_rank is not None else (pair, 0.0)


def _as_stock(left: torch.Tensor, right: torch.Tensor) -> Factors:
    """LoRA's A and B of such factors, as PEFT lays them out: those of experts one below the other, B with the experts innermost."""
    if left.dim() == 2:
        return right, left
    return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)


def on_load(
    model: nn.Module,
    adapter: str,
    state: Mapping[str, Any],
    prefix: str,
    identity: Mapping[str, Any],
    folder: str | None,
) -> None:
    """An adapter is being loaded into a live projection model: takes over the state that lies beside it.

    Raises: SaveError where there is none, since the stock adapter alone would load as nothing; and, before anything is changed,
    where it is that of other options or shapes.
    """
    named = re.compile(r"\.lora_[AB](\.[^.]+)?\.weight$")
    keys = [k for k in state if k.startswith(prefix) and named.search(k)]
    if not keys:
        return
    path = os.path.join(folder, STATE) if folder is not None else None
    if path is None or not os.path.isfile(path):
        raise SaveError(
            f"{folder or 'this state'} holds no {STATE}: a projection cannot go on from an adapter alone. Load a folder that "
            "a projection run has saved, with model.load_adapter(folder, adapter_name), or start from the adapter with "
            "PeftModel.from_pretrained(model, folder, is_trainable=True), which trains it as ordinary LoRA"
        )
    manifest.read_manifest(folder)  # type: ignore[arg-type]
    give_up(model)
    saved = load_file(path)
    layers = dict(projections(model, adapter))
    missing = [n for n in layers if f"{n}|counts" not in saved]
    if missing:
        raise SaveError(f"{path} lacks the state of {len(missing)} module(s), such as {missing[0]}")
    with as_written(f"{path} is not the state of a projection"):
        _same(path, layers, saved, identity)
        for name, layer in layers.items():
            restore(layer, part(saved, f"{name}|"))
    live = {f"{prefix}{in_states(n)}": p for n, p in model.named_parameters()}
    for key in keys:  # what is loaded next is what was restored just now
        state[key] = live[key].detach().clone()  # type: ignore[index]


def _same(path: str, layers: Mapping[str, Any], saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    then = note_in(path, "projection")
    known = [k for k in identity if k in then]  # a later version may ask for more
    differ = differences({k: then[k] for k in known}, {k: identity[k] for k in known})
    if differ:
        raise SaveError(
            f"{path} is of a run with other options ({'; '.join(differ)}): give the same to go on, or start from the adapter with "
            "PeftModel.from_pretrained(model, folder, is_trainable=True), which trains it as ordinary LoRA"
        )
    for name, layer in layers.items():
        for key, tensor in (("fixed", fixed_of(layer)), ("trained", trained_of(layer))):
            if saved[f"{name}|{key}"].shape != tensor.shape:
                was, now = tuple(saved[f"{name}|{key}"].shape), tuple(tensor.shape)
                raise SaveError(f"{path}: {name} was projected with a factor {was}, and here it has {now}")


def stock_options(rank: int) -> dict[str, Any]:
    """The options of LoRA that the saved factors are read by."""
    return {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}


def rank_in(folder: str | os.PathLike[str]) -> int | None:
    """The rank of the linears that a folder holds factors of; None where it holds none. Raises: SaveError for experts."""
    path = Path(folder, manifest.WEIGHTS[0])
    shapes = {n: shape for n, (shape, _) in header_of(path).items() if ".lora_" in n} if path.is_file() else {}
    ranks = {shape[0] if ".lora_A." in n else shape[1] for n, shape in shapes.items()}
    if len(ranks) > 1:
        raise SaveError(
            f"{folder}: experts that a pickled copy of a projection has trained are saved by the original alone"
        )
    return max(ranks, default=None)


def watch() -> None:
    """Lets PEFT's own ways to read an adapter find all that was trained, in this process."""
    watch_states(_whole)


def _whole(model: nn.Module, config: Any, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not getattr(config, "projects", False):
        return {}
    if any(map(is_cut, found.values())):
        # a Trainer's sharded checkpoint, which gets a folder besides
        tether = known_of(base_of(model)).tether
        if tether is None or not any(f.adapter == adapter and f.checks.running for f in tether.followers):
            raise SaveError(CUT)
        return {}
    record = record_of(config)
    return whole(model, adapter, found, record.asked.max_rank if record is not None else None)
