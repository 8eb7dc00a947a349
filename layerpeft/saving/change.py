"""How far the layers of an earlier run moved, as scores, from what its folder holds: one tensor is read at a time."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpeft.errors import Problems, ScoreError
from layerpeft.integrations.files import read_json, version_of
from layerpeft.integrations.peft import dequantized
from layerpeft.model import weights
from layerpeft.model.layers import LayerMap, Target, base_of, find_module, layer_map
from layerpeft.model.names import adapted, place_among
from layerpeft.model.stacked import EXPERT, place_of, stack_of
from layerpeft.model.units import in_units
from layerpeft.saving.manifest import CONFIG, WEIGHTS, read_manifest
from layerpeft.saving.shards import Checkpoint, entries_of
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import Selection

PREFIX = "base_model.model."  # of PEFT's names
_FACTOR = re.compile(r"^(?P<module>.+?)(?:\.base_layer)*\.lora_A\.weight$")
# options of LoRA with which B·A is not the change
_ODD = ("use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "use_qalora", "lora_bias")
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica", "orthogonal")


@dataclass(frozen=True)
class Moved:
    """One weight: its layer, `‖ΔW‖²`, and the name of the weight of the base."""

    name: str
    layer: int
    square: float


def change_of(folder: str | Path, model: nn.Module, relative: bool = False, among: LayerMap | None = None) -> Scores:
    """`‖ΔW‖` of every layer over what trained in it, 0 of those that did not; `relative`: over `‖W‖` of the same weights.
    `among`: the units below layers of which it is told, in their place.

    `model`: the base that the run began with. LoRA and projections: ΔW = scale · B·A; full weights: what was saved less the base.
    Raises: SaveError for a folder that is damaged; ScoreError for one of another architecture, or of which B·A is not the change.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if manifest.get("selection") is None:
        raise ScoreError(f"{folder} was saved before its layers were chosen, so nothing trained in it")
    selection = Selection.from_dict(manifest["selection"])
    whole = layer_map(model, selection.stack)
    layers = among if among is not None and among.stack == whole.stack else whole
    if selection.fingerprint != _chosen_from(selection, whole).fingerprint:
        raise ScoreError(f"the run in {folder} trained another model: names or shapes of its targets differ")
    if not (folder / WEIGHTS[0]).is_file():
        raise ScoreError(f"{folder} holds no {WEIGHTS[0]}")
    config = read_json(folder / CONFIG)
    _refuse_odd(folder, config)
    stored = Checkpoint(folder, entries_of(folder / WEIGHTS[0]))
    squares = [0.0] * len(layers)
    bases = [0.0] * len(layers)
    parts: dict[str, float] = {}
    for moved, base in _all(stored, config, model, layers, relative):
        squares[moved.layer] += moved.square
        bases[moved.layer] += base
        parts[moved.name] = (moved.square / (base or 1.0 if relative else 1.0)) ** 0.5
    if not any(squares):
        raise ScoreError(f"{folder} holds nothing that moved in the layers of {selection.stack!r}")
    values = tuple((s / (b or 1.0 if relative else 1.0)) ** 0.5 for s, b in zip(squares, bases, strict=True))
    origin = {"model_type": layers.model_type, "folder": str(folder), "method": manifest["method"]}
    origin |= {package: version_of(package) for package in ("layerpeft", "torch", "transformers")}
    asked = {"relative": relative}
    return Scores(values, "change", layers.fingerprint, layers.stack, asked, parts, origin, layers.unit)


def _chosen_from(selection: Selection, layers: LayerMap) -> LayerMap:
    """The map that a choice was made from, in this model: of layers, or of units below them that held targets."""
    units, names = in_units(layers, selection.unit, layers.targets)[0], set(selection.layer_names)
    return units if units is layers else replace(units, layers=tuple(u for u in units.layers if u.name in names))


def _refuse_odd(folder: Path, config: Mapping[str, Any]) -> None:
    problems = Problems(f"how far the layers of {folder} moved cannot be told from its files")
    for key in _ODD:
        if config.get(key):
            problems.add(f"{key}={config[key]!r}: B·A is not the change")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_REWRITES_BASE):
        problems.add(f"init_lora_weights={start!r}: the adapter began with something of the base, or other than 0")
    problems.raise_if_any(ScoreError)


def _all(
    stored: Checkpoint, config: Mapping[str, Any], model: nn.Module, layers: LayerMap, relative: bool
) -> Iterator[tuple[Moved, float]]:
    """What moved, and `‖W‖²` of its base where that is asked for."""
    targets, singles = {adapted(t.name): t for t in layers.targets}, _singles(layers)
    place = place_among([adapted(name) for name in layers.names])
    parameters = dict(base_of(model).named_parameters())
    owned: dict[str, list[Target]] = {}
    for target in layers.targets:
        owned.setdefault(adapted(target.name.rpartition(".")[0]), []).append(target)
    for key in stored.entries:
        name = key.removeprefix(PREFIX)
        factor = _FACTOR.match(name)
        if factor is not None:
            a, b = stored.read(key).double(), stored.read(key.replace(".lora_A.", ".lora_B.")).double()
            for target, own_a, own_b in _single_factors(model, singles, factor["module"], a, b):
                square = (
                    _product(own_a, own_b, target)
                    * _scale(config, replace(target, name=stack_of(target.name)), own_a) ** 2
                )
                yield Moved(target.name, target.layer, square), weights.squared_norm(model, target) if relative else 0.0
            target = targets.get(factor["module"]) or _experts(owned.get(factor["module"], []), a, b)
            if target is not None and (layer := place(adapted(target.name))) is not None:
                square = _product(a, b, target) * _scale(config, target, a) ** 2
                yield Moved(target.name, layer, square), weights.squared_norm(model, target) if relative else 0.0
        elif name in singles:
            before, after = _base(model, parameters, name), stored.read(key)
            for target in singles[name]:
                expert = place_of(target.name)[1]
                change, base = weights.change_of(before[expert], after[expert])
                yield Moved(target.name, target.layer, change), base
        elif ".lora_" not in name and (layer := place(name)) is not None:
            change, base = weights.change_of(_base(model, parameters, name), stored.read(key))
            yield Moved(name, layer, change), base


def _singles(layers: LayerMap) -> dict[str, list[Target]]:
    """The targets that are single experts of a 3-D tensor, by that tensor."""
    found: dict[str, list[Target]] = {}
    for target in layers.targets:
        if target.kind == EXPERT:
            found.setdefault(adapted(stack_of(target.name)), []).append(target)
    return found


def _single_factors(
    model: nn.Module, singles: Mapping[str, list[Target]], module: str, a: torch.Tensor, b: torch.Tensor
) -> Iterator[tuple[Target, torch.Tensor, torch.Tensor]]:
    """Single experts, each with its A (r, in) and B (out, r) out of those of all experts of a module."""
    for stack, held in singles.items():
        if stack.rpartition(".")[0] != module or _experts(held[:1], a, b) is None:
            continue
        number = len(find_module(model, stack).get_parameter(stack.rpartition(".")[2]))
        all_a, all_b = a.reshape(number, -1, a.shape[1]), b.reshape(b.shape[0], -1, number)
        for target in held:
            expert = place_of(target.name)[1]
            yield target, all_a[expert], all_b[:, :, expert]
        return


def _base(model: nn.Module, parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight of the base as numbers."""
    if name.endswith(".weight"):
        module = find_module(model, name.removesuffix(".weight"))
        if isinstance(module, nn.Linear) or hasattr(module, "W_q"):
            return dequantized(module)
    if name not in parameters:
        raise ScoreError(f"the run has trained {name}, which this model does not have")
    return parameters[name]


def _experts(held: list[Target], a: torch.Tensor, b: torch.Tensor) -> Target | None:
    """Which of a module's weights of experts these factors are of: PEFT does not name it, its sizes tell."""
    sizes = sorted((a.shape[1], b.shape[0]))
    return next((t for t in held if sorted(t.shape[-2:]) == sizes), None)


def _product(a: torch.Tensor, b: torch.Tensor, target: Target) -> float:
    """`‖B·A‖²`, of experts summed."""
    if target.kind != "experts":
        return weights.squared_product(a.flatten(1), b.flatten(1))
    a, b = a.reshape(target.shape[0], -1, a.shape[1]), b.reshape(b.shape[0], -1, target.shape[0]).permute(2, 0, 1)
    return weights.squared_product(a, b)


def _scale(config: Mapping[str, Any], target: Target, a: torch.Tensor) -> float:
    """That of B·A, as PEFT finds it."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", target.name))
    alpha = next(own, config["lora_alpha"])
    rank = a.shape[0] / (target.shape[0] if target.kind == "experts" else 1)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
