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

from layerpeft.errors import SaveError, differences
from layerpeft.integrations.files import as_written, note_in, replacing
from layerpeft.saving import manifest
from layerpeft.tuners.galore.folds import Factors, part, recompressed
from layerpeft.tuners.galore.projection import fixed_of, held, projections, restore, state_of, tensors, trained_of

STATE = "layerpeft_state.safetensors"
KEYS = ("lora_A.weight", "lora_B.weight")


def write(
    folder: str | os.PathLike[str], model: nn.Module, adapter: str, identity: Mapping[str, Any], max_rank: int | None
) -> tuple[dict[str, int], list[float]]:
    """Puts the sum of all that was trained, as stock LoRA factors, into the weights that PEFT has just saved, and writes the state.

    `identity`: the options that a run which goes on from there must share. Returns the ranks by module, and the relative errors
    of those that `max_rank` cut. Raises: SaveError for a module that is not among the saved weights.
    """
    found = {n: (layer, *_cut(held(layer), max_rank)) for n, layer in projections(model, adapter)}
    paths = {n: state_of(layer).path or n for n, (layer, *_) in found.items()}
    weights, path = _read(folder)
    prefix = next(
        (k[: -len(f"{n}.{e}")] for k in weights for n in paths.values() for e in KEYS if k.endswith(f"{n}.{e}")), ""
    )
    missing = [n for n in found if f"{prefix}{paths[n]}.{KEYS[0]}" not in weights]
    if missing:
        raise SaveError(f"{folder}: {len(missing)} trained module(s) are not among the saved weights: {missing[0]}")
    for name, (_, pair, _) in found.items():
        for key, factor in zip(KEYS, _as_stock(*pair), strict=True):
            weights[f"{prefix}{paths[name]}.{key}"] = factor.contiguous()
    with replacing(Path(path)) as file:
        save_file(weights, file, {"format": "pt"}) if path.endswith(".safetensors") else torch.save(weights, file)
    state = {f"{n}|{k}": t.contiguous() for n, (layer, *_) in found.items() for k, t in tensors(layer).items()}
    with replacing(Path(folder, STATE)) as file:
        save_file(state, file, {"projection": json.dumps(dict(identity))})
    ranks = {n: pair[0].shape[-1] for n, (_, pair, _) in found.items()}
    return ranks, [error for *_, error in found.values() if error]


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
    saved = load_file(path)
    layers = dict(projections(model, adapter))
    missing = [n for n in layers if f"{n}|counts" not in saved]
    if missing:
        raise SaveError(f"{path} lacks the state of {len(missing)} module(s), such as {missing[0]}")
    with as_written(f"{path} is not the state of a projection"):
        _same(path, layers, saved, identity)
        for name, layer in layers.items():
            restore(layer, part(saved, f"{name}|"))
    live = {f"{prefix}{n}": p for n, p in model.named_parameters()}
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


def options(ranks: Mapping[str, int], default: int) -> dict[str, Any]:
    """The LoRA options under which saved factors of these ranks are read as they are: scaling 1 everywhere."""
    most = max(ranks.values(), default=default)
    pattern = {f"^{re.escape(n)}$": r for n, r in ranks.items() if r != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], str]:
    for name in manifest.WEIGHTS:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            tensors_only = name.endswith(".safetensors")
            return load_file(path) if tensors_only else torch.load(path, weights_only=True, map_location="cpu"), path
    raise SaveError(f"{folder} holds no weights of an adapter")
