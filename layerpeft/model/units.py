"""Units below a layer that can be chosen by themselves: parts of a block (attention, MLP), single targets, attention
heads, single experts.

A map of units stands in the place of a map of layers: `layers[i]` is the ith unit, `Target.layer` the place of the unit that a
target lies in. Whoever counts places, sums over targets or names what was chosen need not know the difference.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from layerpeft.errors import ConfigError, Problem
from layerpeft.model.heads import AFTER_ATTENTION, HEAD, holder, name_of
from layerpeft.model.layers import Layer, LayerMap, Target
from layerpeft.model.names import lying_in, upwards
from layerpeft.model.stacked import EXPERT, one_by_one
from layerpeft.model.targets import MATRICES, MODULE
from layerpeft.text import some

LAYER = "layer"
_EXPERT = re.compile(r"(.*?(?:^|\.)experts\.[a-z_]*\d+)(?:\.|$)")  # `experts.3`, Switch's `experts.expert_3`
_PARTS = {"moe": "mlp"}  # by the first word of a role: routed and shared experts are the MLP of their block


def in_units(layers: LayerMap, unit: str, targets: Sequence[Target]) -> tuple[LayerMap, tuple[Target, ...]]:
    """The map of the units that hold targets, in the order of the model, and those targets, by the place of their unit.

    Modules that train whole and lie in no unit (norms beside the parts of a block) are left out. Raises: ConfigError where the
    model has no such units.
    """
    if unit == LAYER:
        return layers, tuple(targets)
    of_layer = _UNITS[unit]
    units: list[Layer] = []
    held: list[Target] = []
    for layer in layers.layers:
        own = [t for t in targets if t.layer == layer.index]
        if unit == "expert":
            matrices, own = (list(one_by_one(layer.targets, each)) for each in (layer.targets, own))
            layer = replace(layer, targets=tuple(matrices))
        names = of_layer(layer, own)
        for name in dict.fromkeys(names[t.name] for t in own if t.name in names):
            inside, index = lying_in([name]), len(units)
            there = [*layer.targets, *(t for t in own if t.kind == HEAD)]
            matrices = tuple(replace(t, layer=index) for t in there if inside(t.name))
            params = sum(t.params for t in matrices)
            units.append(Layer(index, name, kind_of(name[len(layer.name) + 1 :]), matrices, params, layer.index))
            held += [replace(t, layer=index) for t in own if names.get(t.name) == name]
    if not units:
        raise ConfigError(Problem(("unit",), f"unit: {unit}: {_missing(layers, unit, targets)}"))
    return LayerMap(layers.model_type, layers.stack, layers.stacks, tuple(units), unit, layers), tuple(held)


def kind_of(place: str) -> str:
    """What units of several layers have in common, by their names inside of those: `self_attn.q_proj`, `mlp.experts`."""
    return re.sub(r"(^|\.)experts\.[a-z_]*\d+(?=\.|$)", r"\1experts", holder(place))


def heads_in(layers: LayerMap) -> tuple[Target, ...]:
    """Every attention head of these layers, as a target: the columns (out, size) of the projection that read its output.

    Raises: ConfigError where no layer has heads that can be told apart.
    """
    found = []
    for target in (t for t in layers.targets if t.heads):
        out, size = target.shape[0], target.shape[1] // target.heads
        one = replace(target, role="attention.head", kind=HEAD, shape=(out, size), params=out * size, heads=0)
        found += [replace(one, name=name_of(target.name, head)) for head in range(target.heads)]
    if found:
        return tuple(found)
    after = [t.name for t in layers.targets if t.role == AFTER_ATTENTION]
    why = (
        f"how many heads {some(after)} reads does not follow from the config, or it is not called as a module"
        if after
        else f"{layers.model_type} has no attention whose heads meet in a linear of its own"
    )
    raise ConfigError(Problem(("unit",), f"unit: head: {why}; choose whole layers (unit: layer) with another method"))


def expert_number(name: str) -> int:
    """The number of an expert, by the name of its unit."""
    return int(re.search(r"\d+$", name)[0])  # type: ignore[index]


def _single(layer: Layer, targets: Sequence[Target]) -> Mapping[str, str]:
    """Each target; of modules that train whole those that are matrices, or experts in 3-D tensors."""
    matrices = [a for t in layer.targets if t.kind in MATRICES for a in upwards(t.name)[:2]]
    return {t.name: t.name for t in targets if t.kind != MODULE or t.name in matrices}


def _experts(layer: Layer, targets: Sequence[Target]) -> Mapping[str, str]:
    return {t.name: found[1] for t in targets if (found := _EXPERT.match(t.name))}


def _parts(layer: Layer, targets: Sequence[Target]) -> Mapping[str, str]:
    """The children of the block that hold matrices; those that make one attention, mixer or MLP together are one part."""
    roles: dict[str, Counter[str]] = {}
    for target in layer.targets:
        path = target.name[len(layer.name) + 1 :].split(".")
        deep = (
            2 if len(path) > 1 and path[1].isdigit() and path[0] != "experts" else 1
        )  # T5's blocks keep a list of parts
        role = target.role.partition(".")[0]
        roles.setdefault(".".join([layer.name, *path[:deep]]), Counter())[_PARTS.get(role, role)] += 1
    groups: dict[tuple[str, str], list[str]] = {}
    for child, seen in roles.items():
        above, _, leaf = child.rpartition(".")
        role = seen.most_common(1)[0][0]
        groups.setdefault((above, leaf if role == "other" else role), []).append(leaf)
    names = [f"{above}.{'+'.join(leaves)}" for (above, _), leaves in groups.items()]
    inside = {name: lying_in([name]) for name in names}
    return {t.name: found for t in targets if (found := next((n for n in names if inside[n](t.name)), None))}


_UNITS: dict[str, Callable[[Layer, Sequence[Target]], Mapping[str, str]]] = {
    "sublayer": _parts,
    "target": _single,
    "head": lambda layer, targets: {t.name: t.name for t in targets if t.kind == HEAD},
    "expert": _experts,
}


def _missing(layers: LayerMap, unit: str, targets: Sequence[Target]) -> str:
    if unit != "expert":
        return f"{some([t.name for t in targets])} lie in no {unit}; choose whole layers (unit: layer)"
    stacked = [t for t in layers.targets if t.kind == "experts"]
    if stacked and all(one.kind != EXPERT for one in one_by_one(stacked, stacked)):
        return (
            f"the experts of a layer are one tensor here ({stacked[0].name}), which no module called experts holds; it trains "
            "as a whole; choose such tensors (unit: target)"
        )
    if stacked:
        ends = list(dict.fromkeys(".".join(t.name.split(".")[-2:]) for t in stacked))
        return (
            f"no target lies in an expert; the experts of a layer are in tensors here, which target_parameters names: {ends} "
            "(method: full takes them by target_modules: ['experts'], or by naming nothing)"
        )
    modules = any(_EXPERT.match(t.name) for t in layers.targets)
    return "no target lies in an expert; name some in target_modules" if modules else "the model has no experts"
