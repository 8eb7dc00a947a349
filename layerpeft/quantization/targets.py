"""Which linears of a model may be stored in fewer bits, which are left alone and why, and which belong together."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from layerpeft.errors import ConfigError, Problems, hint
from layerpeft.model.layers import LayerMap, Stacks, Target, base_of, find_module, stacks_of
from layerpeft.model.new_modules import new_modules
from layerpeft.model.precisions import KEPT, precision_of

# serving engines multiply these as one matrix, so they have to be stored alike (roles of `model/architectures.py`)
FUSED = (("attention.q", "attention.k", "attention.v"), ("mlp.gate", "mlp.up"), ("attention.q_a", "attention.kv_a"))
WHY = {
    "conv1d": "stored transposed (Conv1D)",
    "conv": "a convolution",
    "experts": "experts in one 3-D tensor, which no quantization library takes from a live model",
    "parameter": "a router",
}


@dataclass(frozen=True)
class Able:
    """What may be quantized, the numbers of their layers in the stack that a choice is about, and what is left alone, and why.
    `linears`: all that lie in layers, those left alone among them."""

    targets: tuple[Target, ...]
    linears: tuple[Target, ...]
    layers: Mapping[str, int]
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in the order of the model."""
        return tuple(t.name for t in self.targets)


def able(
    model: nn.Module,
    layers: LayerMap,
    skip: Sequence[str] = (),
    extra: Sequence[str] = (),
    stacks: Stacks | None = None,
) -> Able:
    """The linears in the blocks of every stack, without routers and `skip`, and those that `extra` names besides.

    `stacks`: what a walk over the model has found, for a model with several.
    Heads, embeddings, norms, tied weights and tensors without pre-trained values are left alone unless `extra` names them.
    Raises: ConfigError for names that match nothing, or that cannot be quantized.
    """
    base = base_of(model)
    found: dict[str, Target] = {}
    left: dict[str, str] = {}
    linears: list[Target] = []
    shared = _tied(base)
    for stack in layers.stacks or (layers.stack,):
        path = stack.rpartition("=")[2]
        there = layers if path == layers.stack else (stacks := stacks or stacks_of(base)).layers(path)
        linears += [t for t in there.targets if t.kind == "linear"]
        for target in there.targets:
            why = _why_not(base, target, shared)
            if why:
                left[target.name] = why
            else:
                found[target.name] = target
    _outside(base, found, left, shared)
    problems = Problems("quantization")
    for name in sorted(set(skip) & set(extra)):
        problems.add(f"skip_modules and extra_modules both name {name!r}")
    for name in _matching(skip, [*found, *left], "skip_modules", problems):
        if found.pop(name, None) is not None:
            left[name] = "skip_modules names it"
    for name in _matching(extra, [*found, *left], "extra_modules", problems):
        module = find_module(base, name)
        if name in shared:
            problems.add(f"extra_modules: {name} shares its weight with {shared[name]}, which would be lost to it")
        elif type(module) is not nn.Linear:
            problems.add(f"extra_modules: {name} is a {type(module).__name__}; only plain linears are quantized")
        else:
            shape = (module.out_features, module.in_features)
            found[name] = found.get(name) or Target(name, -1, "extra", "linear", shape, shape[0] * shape[1])
            left.pop(name, None)
    problems.raise_if_any(ConfigError)
    order = {n: i for i, (n, _) in enumerate(base.named_modules())}
    inside = {t.name: t.layer for t in layers.targets}
    targets = tuple(sorted(found.values(), key=lambda t: order.get(t.name, 0)))
    return Able(targets, tuple(linears), {t.name: inside[t.name] for t in targets if t.name in inside}, left)


def fused_groups(targets: Iterable[Target]) -> list[tuple[str, ...]]:
    """Targets that have to be stored alike: q, k and v of one attention, gate and up of one feed-forward; others alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for target in targets:
        above, _, _ = target.name.rpartition(".")
        role = target.role.removeprefix("cross_").removeprefix("moe.shared.").removeprefix("moe.experts.")
        full = role if "." in role else f"mlp.{role}"
        kind = next((i for i, group in enumerate(FUSED) if full in group), None)
        key = (target.name,) if kind is None else (above, str(kind))
        groups.setdefault(key, []).append(target.name)
    return [tuple(group) for group in groups.values()]


def split_groups(targets: Iterable[Target], precision: Mapping[str, str]) -> list[str]:
    """Sentences about fused groups whose members are stored differently."""
    found = []
    for group in fused_groups(targets):
        kinds = {name: precision.get(name, KEPT) for name in group}
        if len(set(kinds.values())) > 1:
            ends = ", ".join(f"{n.rpartition('.')[2]} {k}" for n, k in kinds.items())
            found.append(f"{group[0].rpartition('.')[0]}: {ends}")
    return found


def _why_not(base: nn.Module, target: Target, shared: Mapping[str, str]) -> str | None:
    if target.kind != "linear":
        return WHY.get(target.kind, target.kind)
    if target.role.endswith("router"):
        return "a router"
    if target.name in shared:
        return f"shares its weight with {shared[target.name]}"
    if set(target.name.split(".")) & _in_float32(base):
        return "transformers keeps it in float32"
    above, _, leaf = target.name.rpartition(".")
    if reads_weight(type(find_module(base, above)), leaf):
        return "its model reads the weight itself"
    module = find_module(base, target.name)
    if type(module) is not nn.Linear and precision_of(module) == KEPT:
        return f"a {type(module).__name__}, not a plain linear"
    return None


@cache
def reads_weight(kind: type, leaf: str) -> bool:
    """Whether a module's own code computes with the weight of this child, or casts to its type: packed, it would go wrong.
    Told from the source: `self.dt_proj.weight @ …` (Mamba), `….to(self.wo.weight.dtype)` (T5 and its kin)."""
    try:
        lines = inspect.getsource(kind).splitlines()
    except (OSError, TypeError):
        return False
    used = re.compile(rf"self\.{re.escape(leaf)}\.weight\b(?!\.(device|shape|_is_hf_initialized))")
    # what is looked up for the type of attention inputs is overruled by transformers where a model is quantized
    return any(used.search(line) and "target_dtype" not in line for line in lines)


def _in_float32(base: nn.Module) -> set[str]:
    """Names of modules that a model asks to keep in float32: T5's `wo`, by whose type its inputs are cast."""
    lists = (getattr(base, n, None) for n in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return {name for names in lists for name in names or ()}


def _outside(base: nn.Module, found: Mapping[str, Target], left: dict[str, str], shared: Mapping[str, str]) -> None:
    """Linears and embeddings that lie in no block; norms and single vectors go without a word."""
    born = new_modules(base)
    tuners: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if hasattr(type(module), "adapter_layer_names"):
            tuners += (f"{name}.",)
        if name in found or name in left or not name or name.startswith(tuners):
            continue
        if any(name == b or name.startswith(f"{b}.") for b in born):
            left[name] = "new, without pre-trained values"
        elif isinstance(module, nn.Embedding):
            left[name] = "embeddings"
        elif isinstance(module, nn.Linear):
            left[name] = f"shares its weight with {shared[name]}" if name in shared else "outside of the layers"


def _tied(base: nn.Module) -> dict[str, str]:
    """Modules whose weight another module holds as well, with that one's name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is None or not name:
            continue
        other = first.setdefault(id(weight), name)
        if other != name:
            found[name], found[other] = other, name
    return found


def _matching(patterns: Sequence[str], names: Sequence[str], what: str, problems: Problems) -> list[str]:
    """Full names that these names (whole, or from some point on) mean."""
    hits: dict[str, None] = {}
    for pattern in patterns:
        fits = [n for n in names if f".{pattern}." in f".{n}."]
        if not fits:
            ends = {n.rpartition(".")[2] for n in names}
            close = hint(pattern.rpartition(".")[2], ends, "; did you mean {!r}?")
            problems.add(f"{what}: {pattern!r} names no linear of the model{close}")
        hits |= dict.fromkeys(fits)
    return list(hits)
